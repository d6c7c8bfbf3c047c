//! Building blocks of a decoder: operations, linear layers and their storage, normalization,
//! dropout, attention masks, and the key/value cache.

mod cache;
mod dropout;
mod linear;
mod mask;
mod norm;
pub(crate) mod ops;
mod stored;

pub use cache::KvCache;
pub use dropout::Dropout;
pub(crate) use dropout::mix_seed;
pub(crate) use linear::prefix;
pub(crate) use linear::tensor_from_matrix;
pub use linear::{BaseLinear, host_values, matrix_from_tensor};
pub use mask::AttentionMask;
pub use norm::RmsNorm;
pub use stored::{InputGroups, StoredWeight};
