//! Helpers shared by the runtime's tests, which compare the runtime with the decoder.

use burn::tensor::Device;
use elastic_lora::format::WeightFormat;
use elastic_lora::io::HfConfig;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Decoder;
use elastic_lora::nn::{BaseLinear, host_values};
use elastic_lora::runtime::{Model, Session, SessionConfig};

use super::{max_diff, random_values};

pub const F32: WeightFormat = WeightFormat::F32;

/// Returns the decoder's logits at every position.
pub fn full(model: &Decoder, ids: &[u32]) -> Vec<f32> {
    host_values(model.forward(model.tokens(ids, 1).unwrap()))
}

/// Returns the largest absolute logit.
pub fn largest(logits: &[f32]) -> f32 {
    logits.iter().fold(0.0, |a, b| a.max(b.abs()))
}

/// Returns the session's logits at every position. The tokens are passed in pieces of these sizes,
/// and then one by one.
pub fn in_pieces(session: &mut Session, ids: &[u32], pieces: &[usize]) -> Vec<f32> {
    let vocab = session.model().config().vocab_size();
    let (mut out, mut start) = (Vec::new(), 0);
    for n in pieces.iter().copied().chain(std::iter::repeat(1)) {
        let n = n.min(ids.len() - start);
        if n == 0 {
            break;
        }
        let mut logits = vec![f32::NAN; n * vocab];
        session
            .decode_all(&ids[start..start + n], &mut logits)
            .unwrap();
        out.extend(logits);
        start += n;
    }
    out
}

/// Creates a session on the whole model with default settings.
pub fn session(model: &Model) -> Session {
    Session::new(model, &SessionConfig::default()).unwrap()
}

/// Compares the logits at all positions, with the tokens passed at once, in several pieces, and one
/// by one.
pub fn agrees(decoder: &Decoder, session: &mut Session, ids: &[u32], tolerance: f32, what: &str) {
    let want = full(decoder, ids);
    for pieces in [vec![ids.len()], vec![5, 1, 7], vec![]] {
        session.reset();
        let got = in_pieces(session, ids, &pieces);
        let off = max_diff(&got, &want) / largest(&want);
        assert!(
            off < tolerance,
            "{what}, {pieces:?}: off by {off} of the largest logit"
        );
    }
    // `decode` returns the same last logits, also for a prompt in two pieces.
    session.reset();
    let vocab = decoder.config().vocab_size();
    let mut last = vec![0.0; vocab];
    session.decode(&ids[..3], None).unwrap();
    session.decode(&ids[3..], Some(&mut last)).unwrap();
    assert!(max_diff(&last, &want[want.len() - vocab..]) / largest(&want) < tolerance);
    assert_eq!(session.position(), ids.len());
}

/// Creates a Llama with additional config fields, random weights and random biases.
pub fn llama(dims: &LlamaDims, fields: serde_json::Value, seed: u64) -> Decoder {
    let mut raw = HfConfig::new_llama(dims).unwrap().raw().clone();
    raw.extend(fields.as_object().unwrap().clone());
    let device = Device::flex();
    let mut model = Decoder::init(&HfConfig::from_json(raw).unwrap(), seed, &device).unwrap();
    let mut salt = seed;
    model
        .try_for_each_linear(|_, layer| {
            salt += 1;
            let [d_input, d_output] = layer.base.dims();
            let values = random_values(d_input * d_output, salt)
                .iter()
                .map(|v| 0.4 * v)
                .collect();
            let bias = layer
                .base
                .bias
                .is_some()
                .then(|| random_values(d_output, salt + 50));
            layer.base = BaseLinear::from_matrix(
                &Matrix::new(d_output, d_input, values)?,
                bias.as_deref(),
                &device,
            )?;
            Ok(())
        })
        .unwrap();
    model
}
