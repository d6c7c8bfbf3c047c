//! What a searched subnet may cost, in the user's own terms: bytes, milliseconds, or a share of the
//! largest subnet's cost.

use std::fmt;
use std::str::FromStr;

use elastic_lora::eval::{LatencyTable, Phase, measure_ms};
use elastic_lora::io::{DType, atomic};
use elastic_lora::merge::MergeMode;
use elastic_lora::model::Decoder;
use elastic_lora::search::{Goal, SearchOutcome};
use elastic_lora::{Error, Merger, Result, SubnetConfig, SuperNet};
use serde::{Serialize, Serializer};

use crate::pipeline::Run;
use crate::{Method, SearchCost};

/// File with the measured times of parts, so that a resumed run predicts the same.
pub const LATENCY: &str = "latency_table.json";

/// Number of timed runs, of which the shortest counts.
const REPEATS: usize = 15;

/// Number of subnets that are timed to meet a target.
const TRIALS: usize = 4;

/// Largest cost of the subnet that a run chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Bytes of the stored weights.
    Bytes(f64),
    /// Latency in milliseconds.
    Milliseconds(f64),
    /// Fraction of the cost of the largest subnet.
    Share(f64),
}

/// Units of bytes.
const UNITS: [(&str, f64); 7] = [
    ("kB", 1e3),
    ("KiB", 1024.0),
    ("MB", 1e6),
    ("MiB", 1048576.0),
    ("GB", 1e9),
    ("GiB", 1073741824.0),
    ("B", 1.0),
];

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |unit: &str| {
            let number = text.strip_suffix(unit)?.trim_end();
            number.parse::<f64>().ok()
        };
        let bytes = UNITS
            .iter()
            .find_map(|(unit, factor)| Some(number(unit)? * factor));
        let target = if let Some(ms) = number("ms") {
            Self::Milliseconds(ms)
        } else if let Some(percent) = number("%") {
            Self::Share(percent / 100.0)
        } else if let Some(bytes) = bytes {
            Self::Bytes(bytes)
        } else {
            let expected = "a number with a unit: 300MB (kB, MB, GB, KiB, MiB, GiB), 12ms or 40%";
            return Err(Error::argument("target", text, expected));
        };
        let (Self::Bytes(amount) | Self::Milliseconds(amount) | Self::Share(amount)) = target;
        if !(amount > 0.0 && amount.is_finite()) {
            return Err(Error::argument("target", text, "more than 0"));
        }
        Ok(target)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) if *bytes >= 1e6 => write!(f, "{}MB", bytes / 1e6),
            Self::Bytes(bytes) => write!(f, "{bytes}B"),
            Self::Milliseconds(ms) => write!(f, "{ms}ms"),
            Self::Share(share) => write!(f, "{}%", 100.0 * share),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Run<'_> {
    /// The phase whose time is a cost, if one is.
    pub fn phase(&self, model: &Decoder) -> Option<Phase> {
        let n_tokens = model.config().max_position_embeddings().min(256);
        let context = n_tokens / 2;
        match (self.args.target, self.args.cost) {
            (Some(Target::Bytes(_)), _) => None,
            (_, SearchCost::Prefill) => Some(Phase::Prefill { n_tokens }),
            (_, SearchCost::Decode) | (Some(Target::Milliseconds(_)), _) => {
                Some(Phase::Decode { context })
            }
            _ => None,
        }
    }

    /// The measured times of the parts of a supernet. They are measured once for a run.
    pub fn latency_table(&self, net: &SuperNet, phase: Phase) -> Result<LatencyTable> {
        let path = self.out.join(LATENCY);
        if path.exists() {
            let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
            return serde_json::from_str(&text).map_err(|e| Error::json(&path, e));
        }
        let table = LatencyTable::measure(net, phase, REPEATS, &self.progress)?;
        atomic::write_json(&path, &table)?;
        Ok(table)
    }

    /// The type of the weights of a written model.
    pub fn stored_dtype(&self) -> DType {
        self.task.pretrained.dtype
    }

    /// Returns the subnet with the best score that keeps to the target, or `None` without a target.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if no evaluated subnet is small enough.
    pub fn meet_target(
        &self,
        net: &mut SuperNet,
        outcome: &SearchOutcome,
    ) -> Result<Option<SubnetConfig>> {
        let Some(target) = self.args.target else {
            return Ok(None);
        };
        let of_largest = outcome.get(&net.maximal()).map(|largest| largest.cost());
        let limit = match target {
            Target::Bytes(bytes) => bytes,
            Target::Milliseconds(ms) => return self.meet_time(net, outcome, ms).map(Some),
            Target::Share(share) => share * of_largest.unwrap_or(f64::NAN),
        };
        let best = outcome.best(&Goal::ScoreUnder(limit));
        let best = best.ok_or_else(|| missed(target, outcome))?;
        crate::common::say!(
            "target {target}: the best of {} subnets costs {:.4e}, at most {limit:.4e}",
            outcome.evaluations().len(),
            best.cost()
        );
        Ok(Some(best.config.clone()))
    }

    /// Chooses by predicted times, times the chosen subnet, and chooses again with all predictions
    /// scaled by what was measured.
    fn meet_time(
        &self,
        net: &mut SuperNet,
        outcome: &SearchOutcome,
        ms: f64,
    ) -> Result<SubnetConfig> {
        let target = Target::Milliseconds(ms);
        let Some(phase) = self.phase(net.model()) else {
            return Err(Error::argument(
                "target",
                target,
                "a run with a time as cost",
            ));
        };
        let active = net.active().clone();
        let mut scale = 1.0;
        let mut fitting: Option<(f64, f64, SubnetConfig)> = None;
        for _ in 0..TRIALS {
            let goal = Goal::ScoreUnder(ms / scale);
            let Some(best) = outcome.best(&goal) else {
                break;
            };
            net.activate(&best.config)?;
            let merger = Merger::new().with_mode(MergeMode::Dense);
            let extracted = merger.extract(net, &[], &self.progress)?.model;
            let measured = measure_ms(&extracted, phase, REPEATS)?;
            crate::common::say!(
                "target {target}: {:.3} ms predicted, {measured:.3} ms measured",
                best.cost() * scale
            );
            let better = fitting
                .as_ref()
                .is_none_or(|(score, ..)| best.score() < *score);
            if measured <= ms && better {
                fitting = Some((best.score(), measured, best.config.clone()));
            }
            let next = measured / best.cost();
            if (next / scale - 1.0).abs() < 0.02 {
                break;
            }
            scale = next;
        }
        net.activate(&active)?;
        let found = fitting.map(|(_, _, subnet)| subnet);
        found.ok_or_else(|| missed(target, outcome))
    }
}

fn missed(target: Target, outcome: &SearchOutcome) -> Error {
    let costs = outcome.front().map(|member| member.cost());
    let least = costs.fold(f64::INFINITY, f64::min);
    let expected = format!("at least the cost of the smallest subnet, {least:.4e}");
    Error::argument("target", target, expected)
}

/// Checks that a method can meet a target.
pub fn check(method: Method, target: Option<Target>) -> Result<()> {
    match target {
        Some(target @ Target::Milliseconds(_)) if method != Method::Lonas => {
            let expected = "bytes or a share: ranks hardly change the time; --method lonas does";
            Err(Error::argument("target", target, expected))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        let read = |text: &str| text.parse::<Target>().ok();
        assert_eq!(read("300MB"), Some(Target::Bytes(3e8)));
        assert_eq!(read("1.5 GiB"), Some(Target::Bytes(1.5 * 1073741824.0)));
        assert_eq!(read("12ms"), Some(Target::Milliseconds(12.0)));
        assert_eq!(read("40%"), Some(Target::Share(0.4)));
        for text in ["300", "MB", "-1MB", "0%", "nanms", "12 parsecs", "infMB"] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(Target::Bytes(3e8).to_string(), "300MB");
        assert!(check(Method::Shears, Some(Target::Milliseconds(1.0))).is_err());
        assert!(check(Method::Lonas, Some(Target::Milliseconds(1.0))).is_ok());
    }
}
