//! AdamW, and access to parameters and gradients by path.

mod adamw;
mod gradients;
mod host;
mod params;
#[cfg(all(test, feature = "flex"))]
mod tests;

pub(crate) use adamw::NamedAdamW;
pub(crate) use gradients::{
    Grads, Prefixes, accumulate, active_prefixes, clip_factor, collect, rank_counts, widen,
};
// Public for tests, hidden from users.
#[doc(hidden)]
pub use params::{Parameter, for_each_param};
pub(crate) use params::{load_trainable, trainable};
