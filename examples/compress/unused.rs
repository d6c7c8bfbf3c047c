//! Options that the chosen method does not use. They are refused, because whoever gives one expects
//! it to change the result.

use clap::ArgMatches;
use clap::parser::ValueSource;
use elastic_lora::{Error, Result};

use crate::{Args, Init, Method, Search, SearchMetric};

/// A rule: options, when they are used, and what else would use them.
type Rule = (&'static [&'static str], fn(&Args) -> bool, &'static str);

const RULES: [Rule; 11] = [
    (
        &[
            "widths",
            "heads",
            "depth",
            "multiple",
            "order",
            "subnets",
            "elastic-only",
        ],
        |args| args.method == Method::Lonas,
        "--method lonas",
    ),
    (
        &["bits", "group-size", "symmetric", "quantize", "file-format"],
        |args| args.method.is_sqft() && args.method != Method::SqftSparsePeft,
        "--method sqft, sqft-qa-sparse-peft or table2",
    ),
    (
        &["qa-start", "train-scales"],
        |args| args.method.includes(Method::SqftQaSparsePeft),
        "--method sqft-qa-sparse-peft or table2",
    ),
    (
        &["init"],
        |args| args.init == Init::Pissa || args.method.includes(Method::Sqft),
        "--method sqft or table2, or the start pissa",
    ),
    (
        &["prune", "sparsity", "pattern"],
        |args| args.method != Method::Lonas,
        "the methods other than lonas",
    ),
    (
        &["sparsity"],
        |args| !args.pattern.contains(':'),
        "the patterns other than N:M",
    ),
    (
        &["search", "evals", "metric", "cost", "target", "front"],
        |args| {
            args.method.includes(Method::Shears)
                || (args.method == Method::Lonas && !args.elastic_only)
        },
        "--method all, shears, or lonas without --elastic-only",
    ),
    (
        &["evals"],
        |args| args.search != Search::Heuristic,
        "the searches other than heuristic",
    ),
    (
        &["scoring-share"],
        |args| args.search == Search::Sensitivity && args.metric == SearchMetric::Loss,
        "--search sensitivity and --metric loss",
    ),
    (
        &["groups", "ranks"],
        |args| args.space.is_none(),
        "runs without --space, which names them",
    ),
    (&["plain-text"], |args| args.train.is_some(), "--train"),
];

/// Checks that the method uses all options that were given on the command line.
///
/// # Errors
/// Returns [`Error::InvalidArgument`], naming the first option that it does not use.
pub fn refuse(args: &Args, matches: &ArgMatches) -> Result<()> {
    let given = |option: &str| {
        let source = matches.value_source(&option.replace('-', "_"));
        source == Some(ValueSource::CommandLine)
    };
    for (options, is_used, by) in RULES {
        if is_used(args) {
            continue;
        }
        if let Some(option) = options.iter().find(|option| given(option)) {
            let raw = matches.get_raw(&option.replace('-', "_"));
            let found: Vec<String> = raw
                .into_iter()
                .flatten()
                .map(|value| value.to_string_lossy().into_owned())
                .collect();
            let expected = format!("this run does not use it; it goes with {by}");
            return Err(Error::argument(option, found.join(","), expected));
        }
    }
    Ok(())
}
