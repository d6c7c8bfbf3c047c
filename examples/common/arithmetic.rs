//! Arithmetic word problems with worked steps that end in `#### answer`, in the form of GSM8K
//! (arXiv 2110.14168).
//!
//! A problem combines a cell (kind, wording, numbers) with names and things. Only a hash of the
//! cell decides the split, so the numbers of a test problem never occur in training in the same
//! wording, for any names and any number of problems drawn. Numbers are small: sums below 100,
//! products of one-digit factors.
#![allow(dead_code)] // each example uses a part of it

use std::fmt;
use std::str::FromStr;

use elastic_lora::data::Record;
use elastic_lora::{Error, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Kinds of problem. `x`, `y` and `z` are the numbers in the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `x + y`, at most 99.
    Sum,
    /// `x - y`, where things are lost or given away.
    Difference,
    /// `x - y`, where the things of two people are compared.
    Compare,
    /// `x * y`, one-digit factors.
    Product,
    /// `x / y`, exact, one-digit divisor and quotient.
    Share,
    /// `x + y`, then `- z`.
    AddSub,
    /// `x * y`, then `+ z`.
    MulAdd,
    /// `x * y`, then `- z`.
    MulSub,
    /// `x * y`, then `x +` the product: one person has `y` times as many as the other, and the
    /// total is asked for.
    Times,
    /// `x / y`, then `+ z`.
    ShareAdd,
    /// `x - y`, then `/ z`, exact.
    SubShare,
    /// `x + y`, then `* z`, a one-digit sum.
    AddMul,
}

/// Part of all problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Eight tenths of the cells.
    Train,
    /// One tenth of the cells.
    Valid,
    /// One tenth of the cells.
    Test,
}

/// A word problem.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Problem {
    /// Kind of the problem.
    pub kind: Kind,
    /// The question, in one paragraph.
    pub question: String,
    /// The worked answer, one step per line, then `#### answer`.
    pub answer: String,
}

impl Problem {
    /// Converts the problem to a record in GSM8K's form.
    pub fn into_record(self) -> Record {
        Record::Question {
            question: self.question,
            answer: self.answer,
        }
    }
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 12] = [
        Kind::Sum,
        Kind::Difference,
        Kind::Compare,
        Kind::Product,
        Kind::Share,
        Kind::AddSub,
        Kind::MulAdd,
        Kind::MulSub,
        Kind::Times,
        Kind::ShareAdd,
        Kind::SubShare,
        Kind::AddMul,
    ];

    fn name(self) -> &'static str {
        match self {
            Kind::Sum => "sum",
            Kind::Difference => "difference",
            Kind::Compare => "compare",
            Kind::Product => "product",
            Kind::Share => "share",
            Kind::AddSub => "add_sub",
            Kind::MulAdd => "mul_add",
            Kind::MulSub => "mul_sub",
            Kind::Times => "times",
            Kind::ShareAdd => "share_add",
            Kind::SubShare => "sub_share",
            Kind::AddMul => "add_mul",
        }
    }

    /// Returns the wordings. `{A}` and `{B}` stand for names, `{o}` for things.
    fn wordings(self) -> &'static [&'static str] {
        match self {
            Kind::Sum => &[
                "{A} has {x} {o}. {A} buys {y} more. How many {o} does {A} have?",
                "{A} has {x} {o} and finds {y} more. How many {o} does {A} have now?",
                "{A} has {x} {o}. {B} has {y} {o}. How many {o} do they have in total?",
                "There are {x} {o} in a box. {A} adds {y} more. How many {o} are in the box?",
            ],
            Kind::Difference => &[
                "{A} has {x} {o} and gives away {y}. How many {o} are left?",
                "{A} has {x} {o}. {A} loses {y}. How many {o} does {A} have now?",
                "There are {x} {o} in a box. {A} takes {y}. How many {o} are left in the box?",
                "{A} has {x} {o}. {A} gives {y} to {B}. How many {o} does {A} have left?",
            ],
            Kind::Compare => &[
                "{A} has {x} {o}. {B} has {y} {o}. How many more {o} does {A} have than {B}?",
                "{A} has {y} {o}. {B} has {x} {o}. How many fewer {o} does {A} have than {B}?",
                "{A} has {x} {o}. {B} has {y} fewer. How many {o} does {B} have?",
                "{A} needs {x} {o} and has {y}. How many more {o} does {A} need?",
            ],
            Kind::Product => &[
                "{A} has {x} bags with {y} {o} each. How many {o} does {A} have?",
                "{A} buys {x} boxes of {y} {o}. How many {o} does {A} buy?",
                "{A} lays {x} rows of {y} {o}. How many {o} are there in total?",
                "In {x} days {A} finds {y} {o} each day. How many {o} does {A} find?",
            ],
            Kind::Share => &[
                "{A} shares {x} {o} among {y} friends. How many {o} does each friend get?",
                "{A} puts {x} {o} into {y} bags. How many {o} are in each bag?",
                "{A} packs {x} {o} into boxes of {y}. How many boxes does {A} fill?",
                "{A} lays {x} {o} in {y} equal rows. How many {o} are in each row?",
            ],
            Kind::AddSub => &[
                "{A} has {x} {o}. {A} buys {y} more and gives away {z}. How many {o} are left?",
                "{A} finds {x} {o}, then {y} more, then loses {z}. How many {o} does {A} have?",
                "{A} has {x} {o} and {B} has {y}. They lose {z}. How many {o} are left?",
            ],
            Kind::MulAdd => &[
                "{A} has {x} bags with {y} {o} each and {z} more {o}. How many {o} does {A} have?",
                "{A} buys {x} boxes of {y} {o}. {B} adds {z} more. How many {o} are there in total?",
                "{A} lays {x} rows of {y} {o} and finds {z} more. How many {o} does {A} have now?",
            ],
            Kind::MulSub => &[
                "{A} has {x} bags with {y} {o} each and gives away {z}. How many {o} are left?",
                "{A} buys {x} boxes of {y} {o} and gives {z} to {B}. How many {o} does {A} have left?",
                "{A} lays {x} rows of {y} {o}. {B} takes {z}. How many {o} are left?",
            ],
            Kind::Times => &[
                "{A} has {x} {o}. {B} has {y} times as many. How many {o} do they have in total?",
                "{A} finds {x} {o}. {B} finds {y} times as many. How many {o} do they find in total?",
                "{A} buys {x} {o} and {B} buys {y} times as many. How many {o} do they buy in total?",
            ],
            Kind::ShareAdd => &[
                "{A} shares {x} {o} among {y} friends. Each friend buys {z} more. How many {o} does each friend have now?",
                "{A} puts {x} {o} into {y} bags and adds {z} to each bag. How many {o} are in each bag?",
                "{A} lays {x} {o} in {y} equal rows. {B} adds {z} to each row. How many {o} are in each row now?",
            ],
            Kind::SubShare => &[
                "{A} has {x} {o}, gives away {y} and packs those left into boxes of {z}. How many boxes does {A} fill?",
                "{A} has {x} {o} and loses {y}. {A} shares those left among {z} friends. How many does each friend get?",
                "{A} finds {x} {o}, gives {y} to {B} and puts those left into {z} bags. How many are in each bag?",
            ],
            Kind::AddMul => &[
                "{A} has {x} {o} and buys {y} more. {B} has {z} times as many as {A} now. How many {o} does {B} have?",
                "In each box there are {x} {o}. {A} adds {y} to each of the {z} boxes. How many {o} are there in total?",
                "{A} lays {z} rows of {x} {o} and adds {y} more to each row. How many {o} are there in total?",
            ],
        }
    }

    /// Returns all triples of numbers. `z` is 0 for kinds with two numbers.
    fn numbers(self) -> Vec<[u32; 3]> {
        let mut all = Vec::new();
        let factors = || (2..=9u32).flat_map(|x| (2..=9u32).map(move |y| (x, y)));
        match self {
            Kind::Sum => (2..=97).for_each(|x| all.extend((2..=99 - x).map(|y| [x, y, 0]))),
            Kind::Difference | Kind::Compare => {
                (4..=99).for_each(|x| all.extend((2..=x - 2).map(|y| [x, y, 0])))
            }
            Kind::Product => all.extend(factors().map(|(x, y)| [x, y, 0])),
            Kind::Share => all.extend(factors().map(|(x, y)| [x * y, y, 0])),
            Kind::AddSub => {
                for x in 5..=60u32 {
                    for y in 2..=39u32.min(99 - x) {
                        all.extend((2..=30.min(x + y - 2)).map(|z| [x, y, z]));
                    }
                }
            }
            Kind::MulAdd => {
                factors().for_each(|(x, y)| all.extend((2..=30.min(99 - x * y)).map(|z| [x, y, z])))
            }
            Kind::MulSub => {
                factors().for_each(|(x, y)| all.extend((2..=30.min(x * y - 2)).map(|z| [x, y, z])))
            }
            Kind::Times => (2..=12).for_each(|x| all.extend((2..=6).map(|y| [x, y, 0]))),
            Kind::ShareAdd => {
                factors().for_each(|(x, y)| all.extend((2..=30).map(|z| [x * y, y, z])))
            }
            Kind::SubShare => {
                factors().for_each(|(q, z)| {
                    all.extend((2..=30.min(99 - q * z)).map(|y| [q * z + y, y, z]))
                });
            }
            Kind::AddMul => {
                for (sum, z) in factors().filter(|(sum, _)| *sum > 3) {
                    all.extend((2..=sum - 2).map(|x| [x, sum - x, z]));
                }
            }
        }
        all
    }

    fn answer(self, [x, y, z]: [u32; 3]) -> String {
        let one = |op: char, value: u32| format!("{x} {op} {y} = {value}\n#### {value}");
        let two = |op: char, first: u32, then: &str, value: u32| {
            format!("{x} {op} {y} = {first}\n{then} = {value}\n#### {value}")
        };
        match self {
            Kind::Sum => one('+', x + y),
            Kind::Difference | Kind::Compare => one('-', x - y),
            Kind::Product => one('*', x * y),
            Kind::Share => one('/', x / y),
            Kind::AddSub => two('+', x + y, &format!("{} - {z}", x + y), x + y - z),
            Kind::MulAdd => two('*', x * y, &format!("{} + {z}", x * y), x * y + z),
            Kind::MulSub => two('*', x * y, &format!("{} - {z}", x * y), x * y - z),
            Kind::Times => two('*', x * y, &format!("{x} + {}", x * y), x + x * y),
            Kind::ShareAdd => two('/', x / y, &format!("{} + {z}", x / y), x / y + z),
            Kind::SubShare => two('-', x - y, &format!("{} / {z}", x - y), (x - y) / z),
            Kind::AddMul => two('+', x + y, &format!("{} * {z}", x + y), (x + y) * z),
        }
    }

    /// Returns the cells of a split, each with its wording, its numbers, and the number of problems
    /// in the cells before it, and the total number of problems.
    fn cells(self, split: Split) -> (Vec<Cell>, usize) {
        let mut cells = Vec::new();
        let mut total = 0;
        for (wording, text) in self.wordings().iter().enumerate() {
            let dressings = dressings(text);
            for numbers in self.numbers() {
                if split_of(self, wording, numbers) == split {
                    cells.push(Cell {
                        wording,
                        numbers,
                        first: total,
                    });
                    total += dressings;
                }
            }
        }
        (cells, total)
    }
}

struct Cell {
    wording: usize,
    numbers: [u32; 3],
    first: usize,
}

const NAMES: [&str; 20] = [
    "Tom", "Mia", "Ben", "Ann", "Sam", "Eva", "Leo", "Zoe", "Max", "Ida", "Jim", "Amy", "Dan",
    "Lea", "Rob", "Kim", "Tim", "Joy", "Ned", "Pam",
];

const THINGS: [&str; 16] = [
    "apples", "pens", "books", "coins", "cards", "shells", "stamps", "eggs", "cups", "toys",
    "keys", "nuts", "balls", "beads", "rocks", "cakes",
];

/// Returns the number of combinations of names and things for a wording.
fn dressings(wording: &str) -> usize {
    let second = if wording.contains("{B}") {
        NAMES.len() - 1
    } else {
        1
    };
    NAMES.len() * second * THINGS.len()
}

fn split_of(kind: Kind, wording: usize, numbers: [u32; 3]) -> Split {
    // The finalizer of SplitMix64, which gives the same result on every machine and in every
    // release of the standard library.
    let mix = |state: u64, value: u64| {
        let mut z = state
            .wrapping_add(value)
            .wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let head = mix(mix(0, kind as u64), wording as u64);
    match numbers
        .iter()
        .fold(head, |state, n| mix(state, u64::from(*n)))
        % 10
    {
        0 => Split::Test,
        1 => Split::Valid,
        _ => Split::Train,
    }
}

/// Returns the number of distinct problems of a kind in a split.
pub fn available(kind: Kind, split: Split) -> usize {
    kind.cells(split).1
}

/// Draws `n` distinct problems of one kind, in random order. The same arguments give the same
/// problems on every machine.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if the split has fewer than `n` problems (see [`available`]).
pub fn problems(kind: Kind, split: Split, n: usize, seed: u64) -> Result<Vec<Problem>> {
    let (cells, total) = kind.cells(split);
    if n > total {
        return Err(Error::argument(
            "n",
            n,
            format!("there are {total} problems of kind `{kind}` in this split"),
        ));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(kind as u64 * 3 + split as u64);
    let drawn = rand::seq::index::sample(&mut rng, total, n);
    Ok(drawn
        .into_iter()
        .map(|index| dress(kind, &cells, index))
        .collect())
}

/// Draws `n` distinct problems of several kinds, in numbers proportional to their weights (by
/// largest remainders) and in random order.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `kinds` is empty, a kind is repeated, a weight is negative
/// or not finite, all weights are zero, or a kind has too few problems.
pub fn mixture(kinds: &[(Kind, f64)], split: Split, n: usize, seed: u64) -> Result<Vec<Problem>> {
    let sum: f64 = kinds.iter().map(|(_, weight)| weight).sum();
    if let Some((kind, weight)) = kinds.iter().find(|(_, w)| !w.is_finite() || *w < 0.0) {
        return Err(Error::argument(
            "kinds",
            format!("{kind} with weight {weight}"),
            "weights are 0 or more",
        ));
    }
    if !(sum > 0.0 && sum.is_finite()) {
        return Err(Error::argument(
            "kinds",
            format!("{kinds:?}"),
            "at least one kind with a weight over 0 is needed",
        ));
    }
    if let Some((i, (kind, _))) = kinds
        .iter()
        .enumerate()
        .find(|(i, (k, _))| kinds[..*i].iter().any(|(o, _)| o == k))
    {
        return Err(Error::argument(
            "kinds",
            kind,
            format!("entry {} names this kind again", i + 1),
        ));
    }
    let exact: Vec<f64> = kinds.iter().map(|(_, w)| n as f64 * w / sum).collect();
    let mut counts: Vec<usize> = exact.iter().map(|e| e.floor() as usize).collect();
    let mut order: Vec<usize> = (0..kinds.len()).filter(|i| kinds[*i].1 > 0.0).collect();
    order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
    let missing = n.saturating_sub(counts.iter().sum());
    order
        .iter()
        .cycle()
        .take(missing)
        .for_each(|i| counts[*i] += 1);
    let mut all = Vec::with_capacity(n.min(1 << 20));
    for ((kind, _), count) in kinds.iter().zip(counts) {
        all.extend(problems(*kind, split, count, seed)?);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::MAX);
    all.shuffle(&mut rng);
    Ok(all)
}

fn dress(kind: Kind, cells: &[Cell], index: usize) -> Problem {
    // The cell that contains this index: the last one that does not start after it.
    let cell = &cells[cells.partition_point(|c| c.first <= index) - 1];
    let wording = kind.wordings()[cell.wording];
    let mut rest = index - cell.first;
    let thing = rest % THINGS.len();
    rest /= THINGS.len();
    let first = rest % NAMES.len();
    // Any name except the first one.
    let second = rest / NAMES.len();
    let second = second + usize::from(second >= first);
    let [x, y, z] = cell.numbers;
    let question = wording
        .replace("{A}", NAMES[first])
        .replace("{B}", NAMES[second])
        .replace("{o}", THINGS[thing])
        .replace("{x}", &x.to_string())
        .replace("{y}", &y.to_string())
        .replace("{z}", &z.to_string());
    Problem {
        kind,
        question,
        answer: kind.answer(cell.numbers),
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Kind::ALL
            .into_iter()
            .find(|k| k.name() == s.trim())
            .ok_or_else(|| {
                Error::argument(
                    "kind",
                    format!("{s:?}"),
                    format!("one of {}", Kind::ALL.map(Kind::name).join(", ")),
                )
            })
    }
}
