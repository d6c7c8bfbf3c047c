//! A tokenizer of our own: byte-level BPE in which every digit is a token.
#![allow(dead_code)] // Each program takes some of it.

use elastic_lora::{Error, Result};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, TokenizerBuilder,
};

/// Padding, id 0.
pub const BPE_PAD: &str = "<pad>";
/// Begins a text, id 1; the tokenizer puts it there by itself.
pub const BPE_BOS: &str = "<s>";
/// Ends a text, id 2.
pub const BPE_EOS: &str = "</s>";

/// Trains a byte-level BPE on `texts` and returns its `tokenizer.json`.
///
/// All 256 bytes are tokens, so any text can be encoded and decoding gives it back; digits are never merged; `<s>` is put
/// before a text. The same texts give the same file, byte by byte. Fewer than `vocab_size` tokens come out where the texts
/// have no more pairs to merge.
///
/// # Errors
/// [`Error::InvalidArgument`] where `vocab_size` is below 259 (bytes and special tokens); [`Error::Tokenizer`].
pub fn train_bpe<S: AsRef<str> + Sync>(texts: &[S], vocab_size: usize) -> Result<String> {
    let special = [BPE_PAD, BPE_BOS, BPE_EOS];
    let least = 256 + special.len();
    if vocab_size < least {
        return Err(Error::argument(
            "vocab_size",
            vocab_size,
            format!("at least {least}: all bytes and special tokens"),
        ));
    }
    let fail = |e: String| Error::Tokenizer {
        path: "tokenizer.json (in training)".into(),
        reason: e,
    };
    let byte_level = ByteLevel::new(false, true, true);
    let template = TemplateProcessing::builder()
        .try_single(format!("{BPE_BOS} $A"))
        .and_then(|b| b.try_pair(format!("{BPE_BOS} $A {BPE_BOS}:1 $B:1")))
        .map_err(&fail)?
        .special_tokens(vec![(BPE_BOS, 1)])
        .build()
        .map_err(|e| fail(e.to_string()))?;
    let mut tokenizer: tokenizers::TokenizerImpl<
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    > = TokenizerBuilder::new()
        .with_model(BPE::default().into())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(
            PreSequence::new(vec![Digits::new(true).into(), byte_level.into()]).into(),
        ))
        .with_post_processor(Some(template.into()))
        .with_decoder(Some(byte_level.into()))
        .build()
        .map_err(|e| fail(e.to_string()))?;
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special.iter().map(|t| AddedToken::from(*t, true)).collect())
        .build()
        .into();
    tokenizer
        .train(&mut trainer, texts.iter().map(AsRef::as_ref))
        .map_err(|e| fail(e.to_string()))?;
    tokenizer.to_string(true).map_err(|e| fail(e.to_string()))
}

/// The `tokenizer_config.json` that goes with [`train_bpe`]; `max_len` is the model's context.
pub fn bpe_tokenizer_config(max_len: usize) -> String {
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BPE_BOS,
        "eos_token": BPE_EOS,
        "pad_token": BPE_PAD,
        "clean_up_tokenization_spaces": false,
        "model_max_length": max_len,
    });
    format!("{config:#}\n")
}
