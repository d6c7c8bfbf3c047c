//! A tokenizer for the small model: byte-level BPE in which every digit is its own token.
#![allow(dead_code)] // each example uses a part of it

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

/// Padding token, id 0.
pub const BPE_PAD: &str = "<pad>";
/// Token at the beginning of a text, id 1. The tokenizer adds it by itself.
pub const BPE_BOS: &str = "<s>";
/// Token at the end of a text, id 2.
pub const BPE_EOS: &str = "</s>";

/// Trains a byte-level BPE on `texts` and returns its `tokenizer.json`.
///
/// All 256 bytes are tokens, so any text can be encoded and is recovered by decoding. Digits are
/// never merged, and `<s>` is added before a text. The same texts give the same file, byte by byte.
/// The vocabulary is smaller than `vocab_size` if the texts have no more pairs to merge.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `vocab_size` is below 259 (bytes and special tokens), and
/// [`Error::Tokenizer`] if training fails.
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

/// Returns the `tokenizer_config.json` for [`train_bpe`]. `max_len` is the model's context length.
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
