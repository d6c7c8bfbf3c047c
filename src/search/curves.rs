//! Plots beside the progression of a search: hypervolume over evaluations, and predicted against
//! measured scores.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use super::SearchReport;
use crate::error::{Error, Result};
use crate::io::atomic;

const SIZE: (u32, u32) = (720, 440);
const INK: RGBColor = RGBColor(45, 45, 45);
const GRID: RGBColor = RGBColor(225, 225, 225);
const CURVE: RGBColor = RGBColor(30, 80, 150);

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

impl SearchReport<'_> {
    /// Writes the front as a table (`search_front.md`), the hypervolume over evaluations
    /// (`search_hypervolume.svg`) and, if there are predictions, predicted against measured scores
    /// (`search_predicted.svg`) into a folder, and returns their paths. The folder is created if it
    /// is missing.
    ///
    /// # Errors
    /// Returns [`Error::Io`], naming the file, if a file cannot be written.
    pub fn write_curves(&self, folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        let mut files = vec![("search_front.md", self.to_table())];
        files.push(("search_hypervolume.svg", self.hypervolume_svg()?));
        if !self.comparisons().is_empty() {
            files.push(("search_predicted.svg", self.predicted_svg()?));
        }
        let write = |(name, text): (&str, String)| {
            let path = folder.join(name);
            atomic::write_file(&path, |sink| sink.put(text.as_bytes()))?;
            Ok(path)
        };
        files.into_iter().map(write).collect()
    }

    /// Returns a plot of the hypervolume over the cost of the search in full evaluations.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if the drawing library fails.
    pub fn hypervolume_svg(&self) -> Result<String> {
        let mut spent = 0.0;
        let points: Vec<(f64, f64)> = self
            .outcome()
            .evaluations()
            .iter()
            .zip(self.hypervolumes())
            .map(|(evaluation, volume)| {
                spent += evaluation.fidelity;
                (spent, volume)
            })
            .collect();
        let labels = ["cost of the search, full evaluations", "hypervolume"];
        plot(labels, |chart| {
            chart.curve = points.clone();
        })
    }

    /// Returns a plot of predicted scores against measured ones, with the line where they are equal.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if the drawing library fails.
    pub fn predicted_svg(&self) -> Result<String> {
        let points: Vec<(f64, f64)> = self
            .comparisons()
            .into_iter()
            .filter_map(|(measured, predicted)| {
                let predicted = self.names().shown(*predicted.first()?);
                Some((self.names().shown(measured.score()), predicted))
            })
            .filter(|(x, y)| x.is_finite() && y.is_finite())
            .collect();
        let name = &self.names().score;
        let labels = [format!("{name}, measured"), format!("{name}, predicted")];
        let values = || points.iter().flat_map(|(x, y)| [*x, *y]);
        let low = values().fold(f64::INFINITY, f64::min);
        let high = values().fold(f64::NEG_INFINITY, f64::max);
        plot([&labels[0], &labels[1]], |chart| {
            if low <= high {
                chart.curve = vec![(low, low), (high, high)];
            }
            chart.points = points.clone();
        })
    }
}

/// What a plot shows.
#[derive(Default)]
struct Shown {
    curve: Vec<(f64, f64)>,
    points: Vec<(f64, f64)>,
}

fn plot(labels: [&str; 2], fill: impl Fn(&mut Shown)) -> Result<String> {
    let mut shown = Shown::default();
    fill(&mut shown);
    let mut svg = String::new();
    draw(&mut svg, labels, &shown).map_err(|error| Error::Unsupported {
        what: format!("search plot: {error}"),
    })?;
    Ok(svg)
}

fn draw(svg: &mut String, [x, y]: [&str; 2], shown: &Shown) -> Drawn {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let all = || shown.curve.iter().chain(&shown.points);
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(52)
        .y_label_area_size(90)
        .build_cartesian_2d(range(all().map(|p| p.0)), range(all().map(|p| p.1)))?;
    chart
        .configure_mesh()
        .x_labels(7)
        .y_labels(7)
        .max_light_lines(0)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 16).into_font().color(&INK))
        .x_desc(x)
        .y_desc(y)
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| short(*y))
        .draw()?;
    let line = shown.curve.iter().copied();
    chart.draw_series(LineSeries::new(line, CURVE.stroke_width(2)))?;
    chart.draw_series(
        shown
            .points
            .iter()
            .map(|at| Circle::new(*at, 4, CURVE.filled())),
    )?;
    root.present()?;
    Ok(())
}

/// Returns four digits of a number.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (1e-3..1e5).contains(&size) => {
            let digits = (3.0 - size.log10().floor()).clamp(0.0, 6.0) as usize;
            let text = format!("{value:.digits$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').into(),
                false => text,
            }
        }
        _ => format!("{value:.2e}"),
    }
}

/// Returns the range of the values with a margin.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
        (low.min(x), high.max(x))
    });
    match high - low {
        span if span > 0.0 && span.is_finite() => low - 0.05 * span..high + 0.05 * span,
        _ if low.is_finite() && low == high => {
            let margin = low.abs().max(1.0) * 0.05;
            low - margin..high + margin
        }
        _ => 0.0..1.0,
    }
}
