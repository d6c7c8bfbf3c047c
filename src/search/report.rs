//! Reports the progress of a search as a plot (like Figure 4 of arXiv 2501.16372), a CSV table and
//! JSON.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Evaluation, SearchOutcome};
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::space::{SearchSpace, SubnetConfig};

/// Display names of the objectives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct ObjectiveNames {
    /// Name of the score, such as `validation loss`.
    pub score: String,
    /// Unit of the score, such as `nats per token`; may be empty.
    pub score_unit: String,
    /// Whether a larger score is better. Objectives are always minimised, so the first objective is
    /// then the negated score, and reports show it with its sign reversed.
    pub score_larger_is_better: bool,
    /// Name of the cost, such as `MACs per token`.
    pub cost: String,
    /// Unit of the cost, such as `ms`; may be empty. The plot scales large costs (by k, M, G, T).
    pub cost_unit: String,
}

impl ObjectiveNames {
    /// Creates names without units, for a score that is minimised, such as a loss, and a cost.
    pub fn new(score: impl Into<String>, cost: impl Into<String>) -> Self {
        Self {
            score: score.into(),
            score_unit: String::new(),
            score_larger_is_better: false,
            cost: cost.into(),
            cost_unit: String::new(),
        }
    }

    /// Sets the units.
    pub fn with_units(mut self, score: impl Into<String>, cost: impl Into<String>) -> Self {
        (self.score_unit, self.cost_unit) = (score.into(), cost.into());
        self
    }

    /// Sets whether a larger score is better, as with accuracy.
    pub fn with_larger_is_better(mut self, larger: bool) -> Self {
        self.score_larger_is_better = larger;
        self
    }

    pub(super) fn shown(&self, score: f64) -> f64 {
        match self.score_larger_is_better {
            true => 0.0 - score, // Unlike -score, this never gives "-0".
            false => score,
        }
    }
}

impl Default for ObjectiveNames {
    fn default() -> Self {
        Self::new("validation loss", "MACs per token").with_units("nats per token", "")
    }
}

/// Writes reports of the outcome of a search.
#[derive(Clone, Debug)]
pub struct SearchReport<'a> {
    space: &'a SearchSpace,
    outcome: &'a SearchOutcome,
    names: &'a ObjectiveNames,
    title: String,
    chosen: Vec<(String, SubnetConfig)>,
}

const ROLES: [&str; 3] = ["heuristic", "maximal", "minimal"];

impl<'a> SearchReport<'a> {
    /// Creates a report of `outcome`. It marks the heuristic, maximal and minimal subnets of
    /// `space` if they were evaluated.
    pub fn new(
        space: &'a SearchSpace,
        outcome: &'a SearchOutcome,
        names: &'a ObjectiveNames,
    ) -> Self {
        Self {
            space,
            outcome,
            names,
            title: String::new(),
            chosen: Vec::new(),
        }
    }

    /// Sets what was searched, such as the names of the model and the method. It stands above the
    /// plot.
    pub fn with_title(mut self, title: impl Into<String>) -> Self {
        self.title = title.into();
        self
    }

    /// Marks a subnet that was chosen, under a name such as `best`. A subnet that was not evaluated
    /// is left out.
    pub fn with_chosen(mut self, name: impl Into<String>, config: SubnetConfig) -> Self {
        self.chosen.push((name.into(), config));
        self
    }

    pub(super) fn outcome(&self) -> &SearchOutcome {
        self.outcome
    }

    pub(super) fn names(&self) -> &ObjectiveNames {
        self.names
    }

    /// Returns pairs of predicted and measured objectives, in the order of the evaluations.
    pub(super) fn comparisons(&self) -> Vec<(&Evaluation, &[f64])> {
        let mut found: Vec<(&Evaluation, &[f64])> = Vec::new();
        for (config, values) in self.outcome.predicted().iter().rev() {
            if let Some(measured) = self.outcome.get(config)
                && found.iter().all(|(known, _)| known.index != measured.index)
            {
                found.push((measured, values));
            }
        }
        found.sort_by_key(|(measured, _)| measured.index);
        found
    }

    /// Returns the point up to which hypervolumes are measured: the largest finite score and cost of
    /// the full evaluations. `None` if there is none, or if there are more than two objectives.
    pub(super) fn reference_point(&self) -> Option<[f64; 2]> {
        let full = self.outcome.evaluations().iter().filter(|e| e.is_full());
        let mut worst = [f64::NEG_INFINITY; 2];
        for evaluation in full {
            let [score, cost] = evaluation.objectives[..] else {
                return None;
            };
            if score.is_finite() && cost.is_finite() {
                worst = [worst[0].max(score), worst[1].max(cost)];
            }
        }
        worst.iter().all(|x| x.is_finite()).then_some(worst)
    }

    /// Returns the hypervolume after each evaluation, up to the largest score and cost of all; empty
    /// if there are not two objectives.
    pub(super) fn hypervolumes(&self) -> Vec<f64> {
        let reference = self.reference_point();
        reference.map_or_else(Vec::new, |reference| self.outcome.hypervolumes(&reference))
    }

    /// Returns the front as a table in Markdown, cheapest first: number of the evaluation, cost,
    /// score, its standard error if it is known, roles, and the values of the groups.
    pub fn to_table(&self) -> String {
        let mut text = format!(
            "| evaluation | {} | {} | standard error | role | values |\n|---|---|---|---|---|---|\n",
            self.names.cost, self.names.score
        );
        for member in self.outcome.front() {
            let error = member.score_error;
            let _ = writeln!(
                text,
                "| {} | {} | {:.5} | {} | {} | {} |",
                member.index + 1,
                member.cost(),
                self.names.shown(member.score()),
                error.map_or(String::new(), |error| format!("{error:.5}")),
                self.roles(&member.config).join(", "),
                member.config,
            );
        }
        text
    }

    /// Roles of a subnet, and the names under which it was chosen.
    fn roles(&self, config: &SubnetConfig) -> Vec<&str> {
        let references = self.references();
        let chosen = self.chosen.iter();
        let chosen = chosen.map(|(name, config)| (name.as_str(), config));
        ROLES
            .into_iter()
            .zip(&references)
            .chain(chosen)
            .filter(|(_, of)| config == *of)
            .map(|(name, _)| name)
            .collect()
    }

    /// Writes `search_progression.svg`, `.csv` and `.json` into a folder and returns their paths.
    /// The folder is created if it is missing, and each file is written atomically.
    ///
    /// # Errors
    /// Returns [`Error::Io`], naming the file, if a file cannot be written.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<[PathBuf; 3]> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let path = |extension: &str| folder.join(format!("search_progression.{extension}"));
        let paths = [path("svg"), path("csv"), path("json")];
        for (path, text) in paths
            .iter()
            .zip([self.to_svg()?, self.to_csv(), self.to_json()?])
        {
            atomic::write_file(path, |sink| sink.put(text.as_bytes()))?;
        }
        Ok(paths)
    }

    fn references(&self) -> [SubnetConfig; 3] {
        [
            self.space.heuristic(),
            self.space.maximal(),
            self.space.minimal(),
        ]
    }

    /// Returns a CSV table with one row per evaluation, in the order of proposals: number (from 1),
    /// cost, score (with its original sign if a larger score is better), whether it is on the
    /// front, roles (`heuristic`, `maximal`, `minimal`, and the names of chosen subnets), whether it
    /// was cached, seconds, fidelity, the hypervolume so far (up to the largest score and cost of all;
    /// empty if there are not two objectives), and the values in the space's order of groups.
    pub fn to_csv(&self) -> String {
        let volumes = self.hypervolumes();
        let mut text = String::from(
            "evaluation,cost,score,front,role,cached,seconds,fidelity,hypervolume,values\n",
        );
        for evaluation in self.outcome.evaluations() {
            let roles = self.roles(&evaluation.config);
            let volume = volumes.get(evaluation.index).map(f64::to_string);
            let values = self.space.values(&evaluation.config).unwrap_or_default();
            let values: Vec<String> = values.iter().map(usize::to_string).collect();
            let _ = writeln!(
                text,
                "{},{},{},{},{},{},{},{},{},{}",
                evaluation.index + 1,
                evaluation.cost(),
                self.names.shown(evaluation.score()),
                u8::from(self.outcome.is_on_front(evaluation.index)),
                roles.join(" "),
                u8::from(evaluation.cached),
                evaluation.seconds,
                evaluation.fidelity,
                volume.unwrap_or_default(),
                values.join(" "),
            );
        }
        text
    }

    /// Returns JSON with the names, the unchanged evaluations (objectives minimised, score first),
    /// the front as positions among the evaluations, cheapest first, and the positions of the
    /// heuristic, maximal, minimal and chosen subnets (null if not evaluated); the cost in full
    /// evaluations, the hypervolume after each evaluation with its reference point, and what was
    /// predicted.
    ///
    /// # Errors
    /// Returns [`Error::Json`] if serialization fails, which no outcome is known to cause.
    pub fn to_json(&self) -> Result<String> {
        let at =
            |config: &SubnetConfig| self.outcome.get(config).map(|evaluation| evaluation.index);
        let [heuristic, maximal, minimal] = self.references();
        let chosen: serde_json::Map<String, Value> = self
            .chosen
            .iter()
            .map(|(name, config)| (name.clone(), json!(at(config))))
            .collect();
        let value = json!({
            "title": self.title,
            "searcher": self.outcome.searcher(),
            "stopped": self.outcome.stopped(),
            "objectives": self.names,
            "n_subnets_log10": self.space.log10_n_subnets(),
            "front": self.outcome.front().map(|evaluation| evaluation.index).collect::<Vec<_>>(),
            "heuristic": at(&heuristic),
            "maximal": at(&maximal),
            "minimal": at(&minimal),
            "chosen": chosen,
            "n_full_evaluations": self.outcome.n_full_evaluations(),
            "hypervolume": {
                "reference": self.reference_point(),
                "after": self.hypervolumes(),
            },
            "predicted": self.comparisons().into_iter().map(|(measured, predicted)| {
                json!({"evaluation": measured.index, "objectives": predicted})
            }).collect::<Vec<_>>(),
            "evaluations": Value::Null,
        });
        let written = || {
            let mut value = value;
            value["evaluations"] = serde_json::to_value(self.outcome.evaluations())?;
            serde_json::to_string_pretty(&value)
        };
        written().map_err(|source| Error::json("search report", source))
    }

    /// Returns a plot of cost against score. Every evaluated subnet is a point, darker the later it
    /// was proposed. The front is a line, the heuristic's score is a dashed line, and chosen subnets
    /// have a square around them. Subnets with objectives that are not finite are omitted.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if the drawing library fails, which no outcome is known to
    /// cause.
    pub fn to_svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|error| Error::Unsupported {
            what: format!("search plot: {error}"),
        })?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (plot, side) = root.split_horizontally(SIZE.0 - SIDE);
        let point = |evaluation: &Evaluation| {
            let (cost, score) = (evaluation.cost(), self.names.shown(evaluation.score()));
            (cost.is_finite() && score.is_finite()).then_some((cost, score))
        };
        let points: Vec<(usize, (f64, f64))> = self
            .outcome
            .evaluations()
            .iter()
            .filter_map(|evaluation| Some((evaluation.index, point(evaluation)?)))
            .collect();
        let front: Vec<(f64, f64)> = self.outcome.front().filter_map(point).collect();
        let references = self
            .references()
            .map(|config| self.outcome.get(&config).and_then(point));

        let (x_range, y_range) = (
            range(points.iter().map(|p| p.1.0)),
            range(points.iter().map(|p| p.1.1)),
        );
        let (factor, unit) = scaled(x_range.end, &self.names.cost_unit);
        let x_digits = digits((x_range.end - x_range.start) / factor);
        let y_digits = digits(y_range.end - y_range.start);
        let mut chart = ChartBuilder::on(&plot)
            .caption(
                match self.title.as_str() {
                    "" => format!("Search progression: {}", self.outcome.searcher()),
                    title => format!("{title}: search by {}", self.outcome.searcher()),
                },
                ("sans-serif", 20),
            )
            .margin(16)
            .x_label_area_size(58)
            .y_label_area_size(100)
            .build_cartesian_2d(x_range.clone(), y_range)?;
        let arrow = if self.names.score_larger_is_better {
            "higher is better"
        } else {
            "lower is better"
        };
        chart
            .configure_mesh()
            .x_labels(7)
            .y_labels(8)
            .max_light_lines(0)
            .bold_line_style(GRID)
            .axis_style(INK)
            .label_style(("sans-serif", 15).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 17).into_font().color(&INK))
            .x_desc(title(&self.names.cost, &unit))
            .y_desc(format!(
                "{}, {arrow}",
                title(&self.names.score, &self.names.score_unit)
            ))
            .x_label_formatter(&|x| fixed(x / factor, x_digits))
            .y_label_formatter(&|y| fixed(*y, y_digits))
            .draw()?;

        if let Some((_, score)) = references[0] {
            let line = [(x_range.start, score), (x_range.end, score)];
            chart.draw_series(DashedLineSeries::new(line, 8, 5, HEURISTIC.stroke_width(2)))?;
        }
        chart.draw_series(LineSeries::new(
            front.iter().copied(),
            FRONT.stroke_width(2),
        ))?;
        let n = self.outcome.evaluations().len();
        chart.draw_series(
            points
                .iter()
                .map(|&(index, at)| Circle::new(at, 4, shade(index, n).filled())),
        )?;
        chart.draw_series(
            front
                .iter()
                .map(|&at| Circle::new(at, 6, FRONT.stroke_width(2))),
        )?;
        for (mark, at) in MARKS.into_iter().zip(references) {
            chart.draw_series(at.map(|at| EmptyElement::at(at) + mark_at(mark, (0, 0))))?;
        }

        let chosen: Vec<(&str, (f64, f64))> = self
            .chosen
            .iter()
            .filter_map(|(name, config)| {
                let at = self.outcome.get(config).and_then(point)?;
                Some((name.as_str(), at))
            })
            .collect();
        chart.draw_series(
            chosen
                .iter()
                .map(|&(_, at)| EmptyElement::at(at) + square((0, 0))),
        )?;

        let text = |size: i32| {
            ("sans-serif", size)
                .into_font()
                .color(&INK)
                .pos(Pos::new(HPos::Left, VPos::Center))
        };
        let mut y = 66;
        let mut entry = |label: String| -> std::result::Result<i32, Box<dyn std::error::Error>> {
            side.draw(&Text::new(label, (40, y), text(15)))?;
            y += 28;
            Ok(y - 28)
        };
        let at = entry("evaluated subnet,".into())?;
        side.draw(&Circle::new((20, at), 4, shade(n / 2, n).filled()))?;
        let at = entry(format!("from no. 1 to no. {n}"))?;
        for step in 0..24 {
            side.draw(&Rectangle::new(
                [(8 + step, at - 6), (9 + step, at + 6)],
                shade(step as usize, 24).filled(),
            ))?;
        }
        let at = entry("Pareto front".into())?;
        side.draw(&PathElement::new(
            [(8, at), (32, at)],
            FRONT.stroke_width(2),
        ))?;
        side.draw(&Circle::new((20, at), 6, FRONT.stroke_width(2)))?;
        for ((mark, name), value) in MARKS.into_iter().zip(ROLES).zip(references) {
            let Some((_, score)) = value else { continue };
            let at = entry(format!("{name}: {}", fixed(score, y_digits + 1)))?;
            if name == ROLES[0] {
                side.draw(&PathElement::new(
                    [(6, at), (12, at)],
                    HEURISTIC.stroke_width(2),
                ))?;
                side.draw(&PathElement::new(
                    [(28, at), (34, at)],
                    HEURISTIC.stroke_width(2),
                ))?;
            }
            side.draw(&mark_at(mark, (20, at)))?;
        }
        for (name, (_, score)) in &chosen {
            let at = entry(format!("{name}: {}", fixed(*score, y_digits + 1)))?;
            side.draw(&square((20, at)))?;
        }
        if points.is_empty() {
            entry("no finite evaluation".into())?;
        }
        root.present()?;
        Ok(())
    }
}

const SIZE: (u32, u32) = (1000, 600);
const SIDE: u32 = 210;
const INK: RGBColor = RGBColor(45, 45, 45);
const GRID: RGBColor = RGBColor(225, 225, 225);
const FRONT: RGBColor = RGBColor(214, 84, 40);
const HEURISTIC: RGBColor = RGBColor(20, 130, 80);

/// Outlines around a point in pixels: a diamond for heuristic, a triangle up for maximal and a
/// triangle down for minimal.
const MARKS: [(&[(i32, i32)], RGBColor); 3] = [
    (&[(0, -9), (9, 0), (0, 9), (-9, 0)], HEURISTIC),
    (&[(0, -9), (9, 7), (-9, 7)], RGBColor(120, 60, 160)),
    (&[(0, 9), (9, -7), (-9, -7)], RGBColor(120, 60, 160)),
];

fn mark_at((outline, color): (&[(i32, i32)], RGBColor), (x, y): (i32, i32)) -> Polygon<(i32, i32)> {
    Polygon::new(
        outline
            .iter()
            .map(|&(dx, dy)| (x + dx, y + dy))
            .collect::<Vec<_>>(),
        color.filled(),
    )
}

/// The outline of a square around a point in pixels, the mark of chosen subnets.
fn square((x, y): (i32, i32)) -> PathElement<(i32, i32)> {
    let corners = [(-11, -11), (11, -11), (11, 11), (-11, 11), (-11, -11)];
    let corners = corners.map(|(dx, dy)| (x + dx, y + dy));
    PathElement::new(corners.to_vec(), INK.stroke_width(2))
}

/// Returns a blue that darkens over the course of the search.
fn shade(index: usize, n: usize) -> RGBColor {
    let t = index as f64 / (n.max(2) - 1) as f64;
    let mix = |from: f64, to: f64| (from + (to - from) * t.min(1.0)) as u8;
    RGBColor(mix(176.0, 8.0), mix(208.0, 42.0), mix(236.0, 100.0))
}

/// Returns the range of the values with a margin. A single value gets a margin on both sides.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
        (low.min(x), high.max(x))
    });
    if low > high {
        return 0.0..1.0;
    }
    let mut margin = (high - low) * 0.06;
    if !margin.is_finite() || margin <= low.abs().max(high.abs()) * 1e-9 {
        margin = low.abs().max(high.abs()) * 0.05;
        if margin < 1e-6 {
            margin = 1.0;
        }
    }
    (low - margin).max(f64::MIN / 4.0)..(high + margin).min(f64::MAX / 4.0)
}

/// Returns the divisor of an axis and its unit after the division.
fn scaled(largest: f64, unit: &str) -> (f64, String) {
    let scales = [
        (1e12, "T", "10¹² "),
        (1e9, "G", "10⁹ "),
        (1e6, "M", "10⁶ "),
        (1e3, "k", "10³ "),
    ];
    match scales
        .into_iter()
        .find(|(factor, ..)| largest.abs() >= *factor)
    {
        Some((factor, prefix, _)) if unit.is_empty() => (factor, prefix.to_string()),
        Some((factor, _, power)) => (factor, format!("{power}{unit}")),
        None => (1.0, unit.to_string()),
    }
}

/// Returns the number of decimals needed to distinguish about 8 labels.
fn digits(span: f64) -> usize {
    (1.0 - span.log10().floor()).clamp(0.0, 7.0) as usize
}

fn fixed(value: f64, digits: usize) -> String {
    match value.abs() < 1e7 {
        true => format!("{value:.digits$}"),
        false => format!("{value:.3e}"),
    }
}

fn title(name: &str, unit: &str) -> String {
    if unit.is_empty() {
        name.to_string()
    } else {
        format!("{name} [{unit}]")
    }
}
