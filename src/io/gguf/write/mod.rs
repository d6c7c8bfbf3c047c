//! Writes models and adapters as GGUF files.
//!
//! A model is read tensor by tensor from any [source](crate::io::source) and written as a stream.
//! Its names, permutations and keys come from the table that the reader uses.
//!
//! Blocks of different sizes are written as architecture `deci`. Parts that an architecture cannot
//! leave out or make smaller are filled up with zeros, which does not change what the model
//! computes:
//!
//! - `deci`: llama.cpp drops the attention of a block without an MLP, so such a block gets a small
//!   MLP whose weights are zero; and a first block without attention gets attention;
//! - other architectures have one size for all blocks, so all are filled up to the widest.

mod adapter;
pub(in crate::io::gguf) mod container;
mod quantize;
mod tokenizer;

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use super::blocks::Encoding;
use super::config::{DIVISORS, EMBEDDING, HEAD, NORM, Row};
use super::families::{self, LONG_FACTORS, SHORT_FACTORS};
use super::layout::place;
use crate::arch::{Architecture, BlockDims, Family, Rope, RopeConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::io::HfConfig;
use crate::io::source::{FolderSource, Held, ModelSource};
use crate::io::tensors::{DType, encode};
use crate::progress::{Progress, Silent, Task};
use container::{Keys, Tensor};
use quantize::Kind;

/// Width of an MLP that a block gets because it must have one: one block of 32.
const SMALL_MLP: usize = 32;
/// `general.quantization_version` of the block types.
const QUANTIZATION_VERSION: u32 = 2;
/// `general.file_type` of a file without a type of its own.
const FILE_TYPE_GUESSED: u32 = 1024;

/// Type of a tensor in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GgufType {
    /// 32-bit floating point.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit integers; 32 share an `f16` scale.
    Q8_0,
    /// 4-bit integers from -8 to 7; 32 share an `f16` scale.
    Q4_0,
    /// 4-bit integers; 32 share an `f16` scale and an `f16` minimum.
    Q4_1,
    /// 6-bit integers; 16 share an 8-bit scale, and 256 an `f16` scale of scales.
    Q6K,
}

/// Types with their names, their ids in ggml, their `general.file_type`, and their quantizers.
const TYPES: [(GgufType, &str, u32, u32, Option<Kind>); 7] = [
    (GgufType::F32, "f32", 0, 0, None),
    (GgufType::F16, "f16", 1, 1, None),
    (GgufType::Bf16, "bf16", 30, 32, None),
    (GgufType::Q8_0, "q8_0", 8, 7, Some(Kind::Q8_0)),
    (GgufType::Q4_0, "q4_0", 2, 2, Some(Kind::Q4_0)),
    (GgufType::Q4_1, "q4_1", 3, 3, Some(Kind::Q4_1)),
    (GgufType::Q6K, "q6_k", 14, 18, Some(Kind::Q6K)),
];

/// `general.file_type` of types that are only copied, by their ids in ggml.
const COPIED_FILE_TYPES: [(u32, u32); 8] = [
    (6, 8),
    (7, 9),
    (10, 10),
    (11, 12),
    (12, 15),
    (13, 17),
    (20, 25),
    (23, 30),
];

impl GgufType {
    fn row(self) -> &'static (Self, &'static str, u32, u32, Option<Kind>) {
        let row = TYPES.iter().find(|row| row.0 == self);
        row.unwrap_or(&TYPES[0])
    }

    /// Returns the name, such as `q4_0`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    fn encoding(self) -> Encoding {
        // The reader knows all of these types.
        Encoding::from_id(self.row().2).unwrap_or(Encoding::Plain(DType::F32))
    }

    fn of(encoding: Encoding) -> Option<Self> {
        let id = encoding.id();
        TYPES.iter().find(|row| row.2 == id).map(|row| row.0)
    }

    /// The type, or the nearest one that rows of `cols` numbers can have. llama.cpp's rule is the
    /// same.
    fn for_rows(self, cols: usize) -> Self {
        let fits = |kind: &GgufType| cols.is_multiple_of(kind.encoding().block().0);
        let mut kinds = match self {
            Self::Q6K => vec![self, Self::Q8_0],
            _ => vec![self],
        };
        kinds.retain(fits);
        kinds.first().copied().unwrap_or(Self::F16)
    }
}

impl std::fmt::Display for GgufType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for GgufType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let row = TYPES.iter().find(|row| row.1.eq_ignore_ascii_case(text));
        row.map(|row| row.0).ok_or_else(|| {
            let names: Vec<&str> = TYPES.iter().map(|row| row.1).collect();
            Error::argument("type", text, names.join(", "))
        })
    }
}

/// Settings of [`write_gguf`].
#[derive(Clone, Debug, Default)]
pub struct GgufOptions {
    /// Type of the linear layers of the blocks. By default every weight keeps its type: numbers as
    /// they are, blocks of a GGUF file byte by byte, and codes in the smallest type that holds them
    /// exactly.
    pub linears: Option<GgufType>,
    /// Type of the embedding. By default it is that of the linear layers, or that of the head if
    /// the head is tied to it.
    pub embedding: Option<GgufType>,
    /// Type of the head. By default it is that of the linear layers, but Q6_K for those of 4 bits,
    /// as `llama-quantize` chooses.
    pub head: Option<GgufType>,
    /// Whether codes may be rounded to another grid. By default this is an error.
    pub requantize: bool,
    /// Name of the model in the file. By default that of the source.
    pub name: Option<String>,
    /// Name of the pre-tokenizer in llama.cpp, `tokenizer.ggml.pre`, for a byte-level tokenizer. By
    /// default it is recognized by its pattern.
    pub pre_tokenizer: Option<String>,
    /// Whether an existing file is replaced.
    pub overwrite: bool,
}

impl GgufOptions {
    setters! {
        with_linears(linears: GgufType) = Some(linears);
        with_embedding(embedding: GgufType) = Some(embedding);
        with_head(head: GgufType) = Some(head);
        with_requantize(requantize: bool);
        with_name(name: impl Into<String>) = Some(name.into());
        with_pre_tokenizer(pre_tokenizer: impl Into<String>) = Some(pre_tokenizer.into());
        with_overwrite(overwrite: bool);
    }
}

/// What was written.
#[derive(Clone, Debug, Default)]
pub struct GgufReport {
    /// What the file cannot express, or what llama.cpp does otherwise, in sentences.
    pub notices: Vec<String>,
    /// Number of tensors of each type.
    pub types: BTreeMap<String, usize>,
    /// Number of bytes of all tensors.
    pub tensor_bytes: u64,
}

/// Writes a model as a GGUF file for llama.cpp. The source is a Hugging Face folder, dense or
/// quantized (GPTQ, compressed-tensors), or a GGUF file. The file is written completely or not at
/// all, with one tensor in memory at a time.
///
/// Numbers are rounded as llama.cpp's reference quantizers round them. Codes on a grid are not
/// rounded again: a symmetric 4-bit grid whose groups are multiples of 32 becomes Q4_0 with the
/// same values, zeros included. A weight whose codes the type cannot hold is an error that names a
/// type that can.
///
/// ```no_run
/// # use elastic_lora::io::{GgufOptions, GgufType, write_gguf};
/// let options = GgufOptions::default().with_linears(GgufType::Q4_0);
/// write_gguf("llama-int4", "llama-q4_0.gguf", &options)?;
/// # Ok::<(), elastic_lora::Error>(())
/// ```
///
/// # Errors
/// Returns the errors of opening the source; [`Error::UnsupportedArchitecture`] or
/// [`Error::Unsupported`] if llama.cpp has no form for the model, its tokenizer or its codes;
/// [`Error::TensorOverflow`] if a number is beyond the range of the type; and
/// [`Error::InvalidFile`] if the file exists and `overwrite` is false.
pub fn write_gguf(
    source: impl AsRef<Path>,
    destination: impl AsRef<Path>,
    options: &GgufOptions,
) -> Result<GgufReport> {
    let source = FolderSource::open(source.as_ref())?;
    write_from(&source, destination.as_ref(), options, &Silent)
}

/// Writes a model from any source; see [`write_gguf`].
pub(crate) fn write_from(
    source: &dyn ModelSource,
    destination: &Path,
    options: &GgufOptions,
    progress: &dyn Progress,
) -> Result<GgufReport> {
    let config = source.config();
    let row = Row::of(config)?;
    let target = target(config, row)?;
    let plan = Plan::new(source, row, &target, options)?;
    let mut report = GgufReport::default();
    report.notices.extend_from_slice(config.notices());
    for tensor in &plan.tensors {
        let (len, bytes) = tensor.encoding.block();
        let count = tensor.shape.iter().product::<usize>() / len;
        report.tensor_bytes += (count * bytes) as u64;
        *report.types.entry(name_of(tensor.encoding)).or_default() += 1;
    }
    let mut keys = Keys::default();
    general_keys(source, row, &plan, options, &mut keys);
    model_keys(config, row, &target, &mut keys, &mut report)?;
    tokenizer::keys(source, options, &mut keys, &mut report)?;
    if target.blocks != config.arch().blocks {
        report.notices.push(format!(
            "architecture {} needs more or larger parts of blocks than the model has; \
             they are filled up with zeros",
            row.name
        ));
    }
    if plan.other_types > 0 {
        report.notices.push(format!(
            "{} tensors are F16, because their rows are no whole blocks of the type asked for",
            plan.other_types
        ));
    }
    let task = Task::begin(progress, "write", plan.tensors.len(), "tensors")?;
    let task = RefCell::new(task);
    let task = &task;
    let tensors = plan.tensors.into_iter().map(|tensor| {
        let parts: Vec<String> = tensor.parts.iter().map(|part| part.name.clone()).collect();
        Tensor {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            encoding: tensor.encoding,
            bytes: Box::new(move || {
                task.borrow_mut().step(&tensor.name)?;
                tensor.bytes(source, options.requantize)
            }),
            written: Box::new(move || parts.iter().for_each(|part| source.release(part))),
        }
    });
    let mut tensors: Vec<Tensor<'_>> = tensors.collect();
    let mut vectors: Vec<(&str, Vec<f32>)> = Vec::new();
    vectors.extend(divisors(config.arch()).map(|divisors| (DIVISORS, divisors)));
    if let Some(RopeScaling::LongRope {
        short_factor,
        long_factor,
        ..
    }) = config.arch().ropes.first().map(|rope| &rope.scaling)
    {
        let numbers = |factors: &[f64]| factors.iter().map(|factor| *factor as f32).collect();
        vectors.push((SHORT_FACTORS, numbers(short_factor)));
        vectors.push((LONG_FACTORS, numbers(long_factor)));
    }
    for (name, numbers) in vectors {
        tensors.push(Tensor {
            name: name.into(),
            shape: vec![numbers.len()],
            encoding: Encoding::Plain(DType::F32),
            bytes: Box::new(move || {
                let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
                Ok(bytes.collect())
            }),
            written: Box::new(|| {}),
        });
    }
    container::write(destination, &keys, tensors, options.overwrite)?;
    Ok(report)
}

fn name_of(encoding: Encoding) -> String {
    match encoding {
        Encoding::Plain(dtype) => dtype.name().into(),
        Encoding::Blocks(blocks) => blocks.name.into(),
    }
}

/// The same architecture with blocks of the sizes that the file needs.
fn target(config: &HfConfig, row: &Row) -> Result<Architecture> {
    let arch = config.arch();
    let mut target = arch.clone();
    let with_heads = || arch.blocks.iter().filter(|block| block.has_attention());
    // Query heads for each key/value head.
    let group = with_heads()
        .map(|block| block.n_heads / block.n_kv_heads.max(1))
        .next()
        .unwrap_or(1);
    if row.per_block {
        for (index, block) in target.blocks.iter_mut().enumerate() {
            if !block.has_mlp() {
                block.d_mlp = SMALL_MLP;
            }
            if index == 0 && !block.has_attention() {
                (block.n_heads, block.n_kv_heads) = (group, 1);
            }
        }
        return Ok(target);
    }
    let most = |size: fn(&BlockDims) -> usize| arch.blocks.iter().map(size).max().unwrap_or(0);
    let n_kv_heads = most(|block| block.n_kv_heads).max(1);
    let widest = BlockDims {
        n_heads: n_kv_heads * group,
        n_kv_heads,
        d_mlp: match most(|block| block.d_mlp) {
            0 => SMALL_MLP,
            widest => widest,
        },
    };
    if let Some(other) = with_heads().find(|block| block.n_heads != block.n_kv_heads * group) {
        return Err(Error::Unsupported {
            what: format!(
                "blocks with {group} and with {} query heads for each key/value head, in GGUF \
                 of architecture {}",
                other.n_heads / other.n_kv_heads.max(1),
                row.name
            ),
        });
    }
    target.blocks.fill(widest);
    Ok(target)
}

/// Numbers by which the rotary frequencies are divided, if Llama 3's rule scales them.
fn divisors(arch: &Architecture) -> Option<Vec<f32>> {
    let rope = arch.ropes.first()?;
    let RopeScaling::Llama3 { .. } = rope.scaling else {
        return None;
    };
    let plain = Rope::new(&RopeConfig::new(rope.theta, rope.dims));
    let scaled = Rope::new(rope);
    let pairs = plain.inv_freq().iter().zip(scaled.inv_freq());
    Some(
        pairs
            .map(|(plain, scaled)| (plain / scaled) as f32)
            .collect(),
    )
}

/// A tensor of the file.
struct Planned {
    name: String,
    shape: Vec<usize>,
    encoding: Encoding,
    /// Tensors of the source, stacked.
    parts: Vec<Part>,
    /// Number that is added to the values.
    offset: f32,
}

/// A tensor of the source and its place in a tensor of the file.
struct Part {
    /// Name in a Hugging Face folder.
    name: String,
    /// Shape in the source. `None` if the source has no such tensor.
    from: Option<Vec<usize>>,
    /// Shape in the file, which is not smaller.
    to: Vec<usize>,
    /// Number of heads whose rows are permuted.
    heads: Option<usize>,
}

struct Plan {
    tensors: Vec<Planned>,
    /// Number of tensors that cannot have the type that was asked for, because of their rows.
    other_types: usize,
}

impl Plan {
    fn new(
        source: &dyn ModelSource,
        row: &Row,
        target: &Architecture,
        options: &GgufOptions,
    ) -> Result<Self> {
        let config = source.config();
        let from: BTreeMap<_, _> = config.arch().tensors().into_iter().collect();
        let mut tensors: Vec<Planned> = Vec::new();
        for (name, to) in target.tensors() {
            let Some(in_file) = row.gguf_name(&name) else {
                return Err(Error::Unsupported {
                    what: format!("tensor `{name}` in GGUF of architecture {}", row.name),
                });
            };
            let part = Part {
                from: from.get(&name).cloned(),
                heads: row.permuted_heads(&name, &target.blocks),
                to: to.clone(),
                name,
            };
            match tensors.iter_mut().find(|tensor| tensor.name == in_file) {
                Some(tensor) => {
                    tensor.shape[0] += to[0];
                    tensor.parts.push(part);
                }
                None => tensors.push(Planned {
                    offset: if in_file.ends_with(NORM) {
                        row.norm_offset()
                    } else {
                        0.0
                    },
                    name: in_file,
                    shape: to,
                    encoding: Encoding::Plain(DType::F32),
                    parts: vec![part],
                }),
            }
        }
        let tied = target.tied;
        let mut other_types = 0;
        for tensor in tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2) {
            let of_linears = options.linears;
            let of_head = options.head.or(match of_linears {
                Some(GgufType::Q4_0 | GgufType::Q4_1) => Some(GgufType::Q6K),
                other => other,
            });
            let asked = match tensor.name.as_str() {
                HEAD => of_head,
                EMBEDDING if tied => options.embedding.or(of_head),
                EMBEDDING => options.embedding.or(of_linears),
                _ => of_linears,
            };
            tensor.encoding = tensor.choose(source, asked)?;
            let fits = |asked: GgufType| asked.for_rows(tensor.shape[1]) != GgufType::F16;
            other_types +=
                usize::from(asked.is_some_and(|asked| asked != GgufType::F16 && !fits(asked)));
        }
        Ok(Self {
            tensors,
            other_types,
        })
    }

    /// `general.file_type`: that of most of the layers' weights.
    fn file_type(&self) -> u32 {
        let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
        let layers = self.tensors.iter().filter(|tensor| {
            tensor.shape.len() == 2 && !matches!(tensor.name.as_str(), HEAD | EMBEDDING)
        });
        for tensor in layers {
            let size: usize = tensor.shape.iter().product();
            *sizes.entry(tensor.encoding.id()).or_default() += size;
        }
        let most = sizes.into_iter().max_by_key(|(_, size)| *size);
        let id = most.map_or(0, |(id, _)| id);
        let written = TYPES.iter().map(|row| (row.2, row.3));
        let mut all = written.chain(COPIED_FILE_TYPES);
        all.find(|row| row.0 == id)
            .map_or(FILE_TYPE_GUESSED, |row| row.1)
    }
}

impl Planned {
    /// Chooses the type of a matrix.
    fn choose(&self, source: &dyn ModelSource, asked: Option<GgufType>) -> Result<Encoding> {
        let cols = self.shape[1];
        let asked = asked.map(|asked| asked.for_rows(cols).encoding());
        let mut chosen: Option<Encoding> = None;
        for part in &self.parts {
            let Some([rows, width]) = part.matrix() else {
                continue;
            };
            let held = source.held(&part.name)?;
            let found = match (asked, held) {
                (None, Held::Numbers(DType::F64)) => Encoding::Plain(DType::F32),
                (None, Held::Numbers(dtype)) => Encoding::Plain(dtype),
                (None, Held::Blocks(blocks)) if cols.is_multiple_of(blocks.len) => {
                    Encoding::Blocks(blocks)
                }
                (None, Held::Codes | Held::Blocks(_)) => {
                    let codes = source.codes(&part.name, [rows, width])?;
                    let kind = codes.and_then(|codes| exact_type(&codes, cols));
                    kind.unwrap_or(GgufType::F32).encoding()
                }
                (Some(asked), _) => asked,
            };
            // Parts of a stacked tensor have one type; numbers of 32 bits can hold any other.
            chosen = match chosen {
                Some(other) if other.id() != found.id() => Some(Encoding::Plain(DType::F32)),
                _ => Some(found),
            };
        }
        // Without a part in the source the tensor is zero in any type.
        let chosen = chosen.or(asked).unwrap_or(Encoding::Plain(DType::F32));
        Ok(chosen)
    }

    fn inexact(&self, part: &Part, kind: &str, exact: Option<GgufType>) -> Error {
        let exact = exact.unwrap_or(GgufType::F32);
        Error::Unsupported {
            what: format!(
                "rounding the codes of tensor `{}` again, to {kind} ({exact} holds them exactly, \
                 and `requantize` allows rounding),",
                part.name
            ),
        }
    }

    /// Makes the bytes of the tensor, which are those of the source if they need no change.
    fn bytes<'s>(&self, source: &'s dyn ModelSource, requantize: bool) -> Result<Cow<'s, [u8]>> {
        let mut all = Cow::Borrowed(&[][..]);
        for part in &self.parts {
            let mut bytes = self.part_bytes(part, source, requantize)?;
            if let Some(heads) = part.heads.filter(|heads| *heads > 0) {
                let rows = part.to[0];
                bytes = permuted(&bytes, rows, rows / heads).into();
            }
            if all.is_empty() {
                all = bytes;
            } else {
                all.to_mut().extend_from_slice(&bytes);
            }
        }
        Ok(all)
    }

    fn part_bytes<'s>(
        &self,
        part: &Part,
        source: &'s dyn ModelSource,
        requantize: bool,
    ) -> Result<Cow<'s, [u8]>> {
        let (len, block_bytes) = self.encoding.block();
        let to: usize = part.to.iter().product();
        let n_bytes = to / len * block_bytes;
        let Some(from) = &part.from else {
            // Zeros of every type are zero bytes. A norm that acts on zeros may have any gain.
            let norm = part.to.len() == 1 && part.name.ends_with(NORM);
            if !norm {
                return Ok(vec![0; n_bytes].into());
            }
            let gains = self.plain(&part.name, DType::F32, &vec![1.0; to])?;
            return Ok(gains.into());
        };
        if let ([rows, width], [_, cols], Encoding::Blocks(blocks)) =
            (from.as_slice(), part.to.as_slice(), self.encoding)
        {
            let held = source.held(&part.name)?;
            let mut bytes = match held {
                Held::Blocks(held) if std::ptr::eq(held, blocks) => {
                    copied_rows(source, &part.name, cols / len * block_bytes)?
                }
                _ => self.rounded(part, [*rows, *width], *cols, source, held, requantize)?,
            };
            bytes.resize(n_bytes, 0);
            return Ok(bytes.into());
        }
        let dtype = self.encoding.dtype();
        if self.offset == 0.0
            && *from == part.to
            && let Some(bytes) = source.bytes(&part.name, dtype, from)?
        {
            return Ok(bytes.into());
        }
        let mut values = source.numbers(&part.name, from)?;
        if self.offset != 0.0 {
            values.iter_mut().for_each(|value| *value += self.offset);
        }
        let values = match (from.as_slice(), part.to.as_slice()) {
            ([_, width], [_, cols]) => padded_rows(values, *width, *cols),
            _ => values,
        };
        let mut bytes = self.plain(&part.name, dtype, &values)?;
        bytes.resize(n_bytes, 0);
        Ok(bytes.into())
    }

    fn plain(&self, name: &str, dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(values.len() * dtype.size());
        encode(name, dtype, 0, values, &mut bytes)?;
        Ok(bytes)
    }

    /// Makes blocks of codes, if they are exact or may be rounded, or of numbers.
    fn rounded(
        &self,
        part: &Part,
        shape: [usize; 2],
        cols: usize,
        source: &dyn ModelSource,
        held: Held,
        requantize: bool,
    ) -> Result<Vec<u8>> {
        let kind = GgufType::of(self.encoding).map(|kind| kind.row());
        let Some((_, name, _, _, Some(kind))) = kind else {
            return Err(Error::Unsupported {
                what: format!("writing blocks of type {:?}", self.encoding),
            });
        };
        if !matches!(held, Held::Numbers(_)) {
            let codes = source.codes(&part.name, shape)?;
            let exact = |codes| quantize::exact(codes, *kind, cols);
            if let Some(bytes) = codes.as_ref().and_then(exact) {
                return Ok(bytes);
            }
            if !requantize {
                let other = codes.and_then(|codes| exact_type(&codes, cols));
                return Err(self.inexact(part, name, other));
            }
        }
        let values = source.numbers(&part.name, &shape)?;
        quantize::round(&part.name, *kind, &padded_rows(values, shape[1], cols))
    }
}

impl Part {
    fn matrix(&self) -> Option<[usize; 2]> {
        match self.from.as_deref() {
            Some([rows, cols]) => Some([*rows, *cols]),
            _ => None,
        }
    }
}

/// The smallest block type that holds codes exactly.
fn exact_type(codes: &crate::format::QuantizedMatrix, cols: usize) -> Option<GgufType> {
    let kinds = [GgufType::Q4_0, GgufType::Q4_1, GgufType::Q8_0];
    kinds.into_iter().find(|kind| {
        let kind = kind.row().4;
        kind.is_some_and(|kind| quantize::exact(codes, kind, cols).is_some())
    })
}

/// Copies rows of blocks and fills each up with zeros to `row_bytes`.
fn copied_rows(source: &dyn ModelSource, name: &str, row_bytes: usize) -> Result<Vec<u8>> {
    let rows = source
        .blocks(name)?
        .map_or_else(Vec::new, |blocks| blocks.rows);
    let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
    for (index, row) in rows.iter().enumerate() {
        bytes.extend_from_slice(row);
        bytes.resize((index + 1) * row_bytes, 0);
    }
    Ok(bytes)
}

/// Fills rows of `width` numbers up with zeros to `cols` numbers.
fn padded_rows(values: Vec<f32>, width: usize, cols: usize) -> Vec<f32> {
    if width == cols || width == 0 {
        return values;
    }
    let mut out = vec![0.0; values.len() / width * cols];
    for (out, row) in out.chunks_exact_mut(cols).zip(values.chunks_exact(width)) {
        out[..width].copy_from_slice(row);
    }
    out
}

/// Moves the rows of heads of `size` rows to the places where llama.cpp expects them.
fn permuted(bytes: &[u8], rows: usize, size: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / rows.max(1);
    let mut out = vec![0; bytes.len()];
    if row_bytes > 0 {
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            let at = place(row, size) * row_bytes;
            out[at..at + row_bytes].copy_from_slice(bytes);
        }
    }
    out
}

/// Writes the keys `general.*`. Those of a GGUF source that describe the model are kept.
fn general_keys(
    source: &dyn ModelSource,
    row: &Row,
    plan: &Plan,
    options: &GgufOptions,
    keys: &mut Keys,
) {
    keys.text("general.architecture", row.name);
    keys.text("general.type", "model");
    let path = source.path();
    let stem = if path.is_dir() {
        path.file_name()
    } else {
        path.file_stem()
    };
    let stem = stem.map(|stem| stem.to_string_lossy().into_owned());
    if let Some(name) = &stem {
        keys.text("general.name", name);
    }
    if let Some(gguf) = source.gguf() {
        for (key, value) in &gguf.first().values {
            let ours = [
                "general.architecture",
                "general.type",
                "general.file_type",
                "general.quantization_version",
                "general.alignment",
            ];
            if key.starts_with("general.") && !ours.contains(&key.as_str()) {
                keys.raw(key, gguf.first().encoded(value));
            }
        }
    }
    if let Some(name) = &options.name {
        keys.text("general.name", name);
    }
    keys.u32("general.file_type", plan.file_type());
    let blocks = |tensor: &Planned| matches!(tensor.encoding, Encoding::Blocks(_));
    if plan.tensors.iter().any(blocks) {
        keys.u32("general.quantization_version", QUANTIZATION_VERSION);
    }
}

/// Writes the keys of the architecture.
fn model_keys(
    config: &HfConfig,
    row: &Row,
    target: &Architecture,
    keys: &mut Keys,
    report: &mut GgufReport,
) -> Result<()> {
    let key = |name: &str| format!("{}.{name}", row.name);
    let mut context = target.max_positions;
    let window = target.positions.iter().find_map(|at| at.window);
    let window = window.filter(|_| !matches!(row.family, Family::Gemma2 | Family::Gemma3));
    if let Some(window) = window.filter(|window| *window < context) {
        report.notices.push(format!(
            "architecture {} has no sliding window: the context length is {window} tokens, up to \
             which the results are the same, instead of {context}",
            row.name
        ));
        context = window;
    }
    let rope = &config.arch().ropes[0];
    type SizeOf = fn(&BlockDims) -> usize;
    let sizes: [(&str, SizeOf); 3] = [
        ("feed_forward_length", |block| block.d_mlp),
        ("attention.head_count", |block| block.n_heads),
        ("attention.head_count_kv", |block| block.n_kv_heads),
    ];
    for (name, size) in [
        ("vocab_size", target.vocab_size),
        ("context_length", context),
        ("embedding_length", target.d_model),
        ("block_count", target.blocks.len()),
        ("rope.dimension_count", rope.dims),
        ("attention.key_length", target.head_dim),
        ("attention.value_length", target.head_dim),
    ] {
        keys.size(&key(name), size)?;
    }
    for (name, size) in sizes {
        let mut all = target.blocks.iter().map(size);
        if row.per_block {
            keys.sizes(&key(name), all)?;
        } else {
            keys.size(&key(name), all.next().unwrap_or(0))?;
        }
    }
    keys.f32(
        key("attention.layer_norm_rms_epsilon"),
        target.norm_eps as f32,
    );
    keys.f32(key("rope.freq_base"), config.rope_theta() as f32);
    families::rope_keys(rope, row, keys)?;
    families::keys(target, row, keys)
}

#[cfg(test)]
mod tests;
