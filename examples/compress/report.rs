//! The report of a run, with a row per model: `report.json`, and the same as a table for a
//! terminal.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use elastic_lora::Result;
use elastic_lora::io::atomic;
use serde::Serialize;

/// Measurements of one model. `None` is written as `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Name of the model.
    pub name: String,
    /// Fraction of answers that match exactly, in 0..=1.
    pub accuracy: Option<f64>,
    /// Score (accuracy, or the likelihood of a token) relative to the reference row.
    pub relative: Option<f64>,
    /// Mean negative log-likelihood per token, in nats.
    pub loss: Option<f64>,
    /// Fraction of zeros among the prunable weights, in 0..=1.
    pub sparsity: Option<f64>,
    /// Number of parameters that are not zero.
    pub nonzero_params: Option<u64>,
    /// Number of parameters.
    pub params: Option<u64>,
    /// Multiply-accumulates per token.
    pub macs_per_token: Option<u64>,
    /// Bytes of the weights and the adapter as the runtime stores them.
    pub bytes: Option<u64>,
    /// Storage type of the weights, and of the adapter.
    pub precision: Option<String>,
    /// Speed of reading a prompt relative to the full model.
    pub prefill_speedup: Option<f64>,
    /// Speed of decoding relative to the full model.
    pub decode_speedup: Option<f64>,
    /// Sizes of the blocks, if they are elastic.
    pub shape: Option<String>,
    /// Active rank of each group of adapters, in the order of the search space.
    pub ranks: Option<Vec<usize>>,
    /// Folder or file that holds the model, within that of the run.
    pub folder: Option<String>,
}

impl Row {
    /// Creates a row without measurements.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }
}

/// The rows of a run, and the parameters of the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// One row per model, in the order of measurement.
    pub rows: Vec<Row>,
    /// The command line.
    pub command: String,
    /// Random seed.
    pub seed: u64,
    /// Versions of the software involved, by name.
    pub versions: BTreeMap<String, String>,
}

impl Report {
    /// Creates a report without rows. `versions` holds the version of this crate.
    pub fn new(command: impl Into<String>, seed: u64) -> Self {
        let versions = [("elastic-lora".into(), elastic_lora::VERSION.into())].into();
        Self {
            rows: Vec::new(),
            command: command.into(),
            seed,
            versions,
        }
    }

    /// Writes the report as JSON, atomically.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        atomic::write_json(path, self)
    }
}

/// Maximum width of a table, in characters.
const WIDTH: usize = 80;

/// An aligned table. Columns without any value are omitted. Where all columns do not fit a terminal,
/// the table is folded: further columns follow below, with the names again.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        type Cell = fn(&Row) -> Option<String>;
        let columns: [(&str, Cell); 15] = [
            ("model", |r| Some(r.name.clone())),
            ("accuracy", |r| r.accuracy.map(percent)),
            ("relative", |r| r.relative.map(percent)),
            ("loss", |r| r.loss.map(|v| format!("{v:.4}"))),
            ("sparsity", |r| r.sparsity.map(percent)),
            ("non-zero", |r| r.nonzero_params.map(count)),
            ("parameters", |r| r.params.map(count)),
            ("MACs/token", |r| r.macs_per_token.map(count)),
            ("bytes", |r| r.bytes.map(count)),
            ("precision", |r| r.precision.clone()),
            ("prefill", |r| r.prefill_speedup.map(times)),
            ("decode", |r| r.decode_speedup.map(times)),
            ("shape", |r| r.shape.clone()),
            ("ranks", |r| r.ranks.as_deref().map(ranks)),
            ("folder", |r| r.folder.clone()),
        ];
        let mut table: Vec<Vec<String>> = vec![Vec::new(); self.rows.len() + 1];
        for (title, cell) in columns {
            let cells: Vec<_> = self.rows.iter().map(cell).collect();
            if title != "model" && cells.iter().all(Option::is_none) {
                continue;
            }
            table[0].push(title.into());
            for (line, cell) in table[1..].iter_mut().zip(cells) {
                line.push(cell.unwrap_or_else(|| "-".into()));
            }
        }
        let widths: Vec<usize> = (0..table[0].len())
            .map(|c| {
                table
                    .iter()
                    .map(|line| line[c].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut first = 1;
        loop {
            // As many of the columns that are left as fit beside the names, at least one.
            let (mut end, mut width) = (first, widths[0]);
            while end < widths.len() && (end == first || width + 2 + widths[end] <= WIDTH) {
                width += 2 + widths[end];
                end += 1;
            }
            for (number, line) in table.iter().enumerate() {
                let mut text = format!("{:<1$}", line[0], widths[0]);
                for c in first..end {
                    let (cell, width) = (&line[c], widths[c]);
                    // Words and lists are left-aligned, numbers right-aligned.
                    text += &match table[0][c].as_str() {
                        "ranks" | "shape" | "folder" | "precision" => format!("  {cell:<width$}"),
                        _ => format!("  {cell:>width$}"),
                    };
                }
                writeln!(f, "{}", text.trim_end())?;
                if number == 0 {
                    writeln!(f, "{}", "-".repeat(width))?;
                }
            }
            if end == widths.len() {
                return Ok(());
            }
            writeln!(f)?;
            first = end;
        }
    }
}

fn times(ratio: f64) -> String {
    format!("{ratio:.2}x")
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn count(n: u64) -> String {
    // The smallest number for each unit. Millions begin below one million, so that small models
    // slightly above and below it are easy to compare.
    const UNITS: [(f64, f64, &str); 4] = [
        (1e12, 1e12, "T"),
        (1e9, 1e9, "G"),
        (1e5, 1e6, "M"),
        (1e3, 1e3, "k"),
    ];
    let v = n as f64;
    UNITS.iter().find(|(from, ..)| v >= *from).map_or_else(
        || n.to_string(),
        |(_, unit, letter)| format!("{:.2}{letter}", v / unit),
    )
}

/// Formats ranks as `32` if all are equal, as `32,24,16` if they are few, and as `32x5 24x3 16x4`
/// if they are many.
fn ranks(ranks: &[usize]) -> String {
    let mut counts: BTreeMap<std::cmp::Reverse<usize>, usize> = BTreeMap::new();
    for &r in ranks {
        *counts.entry(std::cmp::Reverse(r)).or_default() += 1;
    }
    match ranks {
        [] => "-".into(),
        [first, ..] if counts.len() == 1 => first.to_string(),
        _ if ranks.len() <= 8 => ranks
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(","),
        _ => counts
            .iter()
            .map(|(r, n)| format!("{}x{n}", r.0))
            .collect::<Vec<_>>()
            .join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Report {
        let mut report = Report::new("compress --seed 7", 7);
        report.rows.push(Row {
            accuracy: Some(0.1234),
            loss: Some(2.0),
            params: Some(1_050_000),
            macs_per_token: Some(980_000),
            ..Row::new("base")
        });
        report.rows.push(Row {
            loss: Some(1.98766),
            sparsity: Some(0.5),
            ranks: Some(vec![8, 4, 8, 2]),
            ..Row::new("Shears, searched")
        });
        report
    }

    #[test]
    fn table_is_aligned_and_leaves_empty_columns_out() {
        let expected = "\
model             accuracy    loss  sparsity  parameters  MACs/token  ranks
-----------------------------------------------------------------------------
base                12.3 %  2.0000         -       1.05M       0.98M  -
Shears, searched         -  1.9877    50.0 %           -           -  8,4,8,2
";
        assert_eq!(example().to_string(), expected);
        assert_eq!(Report::new("c", 1).to_string(), "model\n-----\n");
    }

    #[test]
    fn wide_tables_are_folded() {
        let mut report = Report::new("c", 1);
        report.rows.push(Row {
            accuracy: Some(0.5),
            loss: Some(1.0),
            sparsity: Some(0.5),
            bytes: Some(1_500_000),
            ranks: Some(vec![8, 4]),
            folder: Some("a-folder-with-a-long-name".into()),
            ..Row::new("a model with quite a long name")
        });
        let text = report.to_string();
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        assert_eq!(text.matches("a model with").count(), 2);
        assert_eq!(
            text.lines().last().unwrap().split("  ").last(),
            Some("a-folder-with-a-long-name")
        );
    }

    #[test]
    fn json_has_the_promised_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        example().write(&path).unwrap();
        let value: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let keys: Vec<_> = value["rows"][0]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        let promised = "name accuracy relative loss sparsity nonzero_params params macs_per_token bytes precision \
                        prefill_speedup decode_speedup shape ranks folder";
        let promised: Vec<_> = promised.split_whitespace().collect();
        assert_eq!(keys, promised);
        assert!(value["versions"]["elastic-lora"].is_string() && value["seed"] == 7);
    }

    #[test]
    fn counts_and_ranks_are_short() {
        let shown = [
            (0, "0"),
            (999, "999"),
            (1_500, "1.50k"),
            (656_000, "0.66M"),
            (150_000_000_000, "150.00G"),
            (6_700_000_000, "6.70G"),
        ];
        for (n, text) in shown {
            assert_eq!(count(n), text);
        }
        assert_eq!(ranks(&[4; 20]), "4");
        assert_eq!(ranks(&[8, 4, 2, 8, 8, 8, 8, 8, 8]), "8x7 4x1 2x1");
    }
}
