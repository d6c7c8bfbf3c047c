//! Learning rate schedules.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays constant.
    Constant,
    /// Falls linearly to 0.
    Linear,
    /// Falls to 0 along half a cosine (arXiv 1608.03983, one period).
    #[default]
    Cosine,
}

impl Schedule {
    /// The factor applied to the peak learning rate at `step` (from 0) of `steps`, in 0..=1. It
    /// rises linearly over `warmup` steps (the first step has `1 / warmup`) and then follows this
    /// schedule.
    pub fn factor(self, step: usize, warmup: usize, steps: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let left = steps.saturating_sub(warmup).max(1);
        let done = ((step - warmup) as f64 / left as f64).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - done,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        }
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "constant" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            _ => Err(Error::argument(
                "schedule",
                text,
                "constant, linear or cosine",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_then_decay() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_eq!(schedule.factor(0, 4, 12), 0.25);
            assert_eq!(schedule.factor(3, 4, 12), 1.0);
            assert_eq!(schedule.factor(4, 4, 12), 1.0);
            let factors: Vec<f64> = (4..12).map(|step| schedule.factor(step, 4, 12)).collect();
            assert!(factors.windows(2).all(|w| w[1] <= w[0]));
            assert_eq!(schedule.factor(0, 0, 0), 1.0);
        }
        approx::assert_relative_eq!(Schedule::Linear.factor(8, 4, 12), 0.5);
        approx::assert_relative_eq!(Schedule::Cosine.factor(8, 4, 12), 0.5, epsilon = 1e-12);
        assert!(Schedule::Cosine.factor(11, 4, 12) < 0.05);
        assert!("step".parse::<Schedule>().is_err());
    }
}
