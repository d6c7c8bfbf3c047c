//! What the values of a template may hold. [`source`](super::source) puts these filters around the
//! operations of a template.

use std::sync::LazyLock;

use minijinja::value::{
    DynObject, Kwargs, ObjectRepr, Rest, Tuple, ValueKind, ValueOrKwargs, from_args,
};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};

use super::jinja::invalid;

/// Bytes that a value may hold for each unit of the rendering's fuel.
const BYTES: u64 = 16;

/// Bytes of a text that the engine lets one unit of fuel pay for.
const TEXT: u64 = 64;

/// Bytes that an item of a list or map is counted as.
const ITEM: u64 = 32;

/// Items, and bytes, that one unit of fuel pays for when they are looked at.
const LOOKED: (u64, u64) = (8, 1024);

/// Deepest nesting of lists and maps. The parsers of JSON allow 128 levels.
const DEPTH: usize = 128;

/// Largest width and precision in a format.
const WIDTH: usize = 10_000;

/// The engine's filter of this name, which the one that is put into environments calls.
static FORMAT: LazyLock<Value> = LazyLock::new(|| Value::from_function(minijinja::filters::format));

/// Puts the filters into an environment, and takes out what templates of models do not have and
/// what would need a check of its own.
pub(super) fn add_to(env: &mut Environment<'static>) {
    for name in ["chain", "zip", "split", "lines", "pprint"] {
        env.remove_filter(name);
    }
    env.remove_global("debug");
    env.add_filter("elora_seen", |state: &State, value: Value| {
        look(state, &value).map(|()| value)
    });
    env.add_filter("elora_kept", |state: &State, value: Value| {
        keep(state, &value).map(|()| value)
    });
    env.add_filter("elora_made", made);
    env.add_filter("elora_list", |state: &State, value: Value| {
        listed(state, value)
    });
    env.add_filter("elora_add", add);
    env.add_filter("elora_mul", multiply);
    env.add_function(
        "dict",
        |state: &State, value: Option<Value>, named: Kwargs| {
            made(state, minijinja::functions::dict(value, named)?)
        },
    );
    env.add_function("namespace", |state: &State, args: Rest<ValueOrKwargs>| {
        let args = values(args);
        for value in &args {
            keep(state, value)?;
        }
        let (defaults,) = from_args(&args)?;
        minijinja::functions::namespace(defaults)
    });
    env.add_filter("format", |state: &mut State, args: Rest<ValueOrKwargs>| {
        let args = values(args);
        let (format, rest) = args.split_first().ok_or(ErrorKind::MissingArgument)?;
        let times = format.as_str().map_or(0, |text| text.matches('%').count());
        repeat(state, times, rest)?;
        FORMAT.call(state, &args)
    });
    env.set_formatter(|out: &mut Output, state: &mut State, value: &Value| {
        look(state, value)?;
        minijinja::escape_formatter(out, state, value)
    });
}

/// Returns arguments as values, the named ones as the last of them.
pub(super) fn values(args: Rest<ValueOrKwargs>) -> Vec<Value> {
    args.0.into_iter().map(ValueOrKwargs::into_value).collect()
}

/// Returns how much a value may hold, in bytes.
pub(super) fn bytes(state: &State) -> usize {
    let fuel = state.fuel_levels();
    let fuel = fuel.map_or(u64::MAX, |(used, left)| used.saturating_add(left));
    usize::try_from(fuel.saturating_mul(BYTES)).unwrap_or(usize::MAX)
}

/// Counts what a value holds, as often as it is reached. Returns an error if that is more than it
/// may hold, or if there is a namespace in it: that one could grow later.
pub(super) fn look(state: &State, value: &Value) -> Result<(), Error> {
    walk(state, value, 0).map(|_| ())
}

/// Does the same for a value that is put into another, and so must not be a namespace itself.
fn keep(state: &State, value: &Value) -> Result<(), Error> {
    walk(state, value, 1).map(|_| ())
}

/// Returns the bytes that a value holds.
fn walk(state: &State, value: &Value, depth: usize) -> Result<u64, Error> {
    let most = bytes(state) as u64;
    let mut walk = Walk {
        left: most,
        items: 0,
        bytes: 0,
    };
    let looked = walk.value(value, depth);
    state.consume_fuel(walk.items / LOOKED.0 + walk.bytes / LOOKED.1)?;
    looked.map(|()| most - walk.left)
}

struct Walk {
    left: u64,
    items: u64,
    bytes: u64,
}

impl Walk {
    fn take(&mut self, bytes: u64) -> Result<(), Error> {
        self.left = self.left.checked_sub(bytes).ok_or_else(too_large)?;
        Ok(())
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if let Some(text) = value.as_str() {
            self.bytes = self.bytes.saturating_add(text.len() as u64);
            return self.take(text.len() as u64);
        }
        let Some(object) = value.as_object() else {
            return Ok(());
        };
        if depth > 0 && is_namespace(object) {
            return Err(invalid("a namespace cannot be put into a value"));
        }
        if depth > DEPTH {
            return Err(invalid("a value is nested too deep"));
        }
        match object.repr() {
            ObjectRepr::Map => {
                for (key, value) in object.try_iter_pairs().into_iter().flatten() {
                    self.item(&key, depth)?;
                    self.item(&value, depth)?;
                }
            }
            ObjectRepr::Seq | ObjectRepr::Iterable => {
                for value in object.try_iter().into_iter().flatten() {
                    self.item(&value, depth)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn item(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.items += 1;
        self.take(ITEM)?;
        self.value(value, depth + 1)
    }
}

pub(super) fn too_large() -> Error {
    invalid("a value becomes too large")
}

/// Returns whether a value is what `namespace()` makes. The engine has no other name for it.
fn is_namespace(object: &DynObject) -> bool {
    static NAME: LazyLock<Option<&'static str>> = LazyLock::new(|| {
        let namespace = minijinja::functions::namespace(None).ok()?;
        Some(namespace.as_object()?.type_name())
    });
    // Without a name nothing is told apart, so that everything is refused.
    NAME.is_none_or(|name| name == object.type_name())
}

/// Returns a value that was just made, once it is known to be small enough. What is computed when
/// it is looked at becomes a list, so that such values are not put around each other.
pub(super) fn made(state: &State, value: Value) -> Result<Value, Error> {
    look(state, &value)?;
    listed(state, value)
}

/// Returns what is computed when it is looked at as a list.
fn listed(state: &State, value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable {
        return Ok(value);
    }
    let mut items = Vec::new();
    collect(state, &value, &mut items)?;
    Ok(items.into())
}

fn collect(state: &State, value: &Value, items: &mut Vec<Value>) -> Result<(), Error> {
    let most = bytes(state) / ITEM as usize;
    for item in value.try_iter()? {
        if items.len() % 2 == 1 {
            state.consume_fuel(1)?;
        }
        if items.len() >= most {
            return Err(too_large());
        }
        items.push(item);
    }
    Ok(())
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn is_tuple(value: &Value) -> bool {
    value.downcast_object_ref::<Tuple>().is_some()
}

/// Two numbers as integers or floats.
enum Numbers {
    Integers(i128, i128),
    Floats(f64, f64),
}

fn numbers(a: &Value, b: &Value) -> Option<Numbers> {
    let is_number = |v: &Value| matches!(v.kind(), ValueKind::Number | ValueKind::Bool);
    if !is_number(a) || !is_number(b) {
        return None;
    }
    let is_float = |v: &Value| v.kind() == ValueKind::Number && !v.is_integer();
    if !is_float(a) && !is_float(b) {
        let [a, b] = [a, b].map(|v| i128::try_from(v.clone()).ok());
        return Some(Numbers::Integers(a?, b?));
    }
    let float = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(v.is_true()))),
        _ => f64::try_from(v.clone()).ok(),
    };
    Some(Numbers::Floats(float(a)?, float(b)?))
}

fn integer(value: Option<i128>) -> Result<Value, Error> {
    let value = value.ok_or_else(|| invalid("a number becomes too large"))?;
    Ok(i64::try_from(value).map_or_else(|_| Value::from(value), Value::from))
}

fn unsupported(sign: char, a: &Value, b: &Value) -> Error {
    let (a, b) = (a.kind(), b.kind());
    invalid(format!(
        "tried to use {sign} operator on unsupported types {a} and {b}"
    ))
}

/// `a + b`.
fn add(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok([a, b].concat().into());
    }
    if is_list(a) && is_list(b) && is_tuple(a) == is_tuple(b) {
        // Each was looked at when it was made, so that they are not large.
        let mut items = Vec::new();
        collect(state, a, &mut items)?;
        collect(state, b, &mut items)?;
        let sum = match is_tuple(a) {
            true => Value::from(Tuple::new(items)),
            false => items.into(),
        };
        look(state, &sum)?;
        return Ok(sum);
    }
    match numbers(a, b) {
        Some(Numbers::Integers(a, b)) => integer(a.checked_add(b)),
        Some(Numbers::Floats(a, b)) => Ok((a + b).into()),
        None => Err(unsupported('+', a, b)),
    }
}

/// `a * b`.
fn multiply(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    let (repeated, times) = match (is_list(a) || a.as_str().is_some(), b) {
        (true, times) => (a, times),
        (false, repeated) => (repeated, a),
    };
    let times = || match i128::try_from(times.clone()) {
        Ok(times) if !times.is_negative() => Ok(u64::try_from(times).unwrap_or(u64::MAX)),
        Ok(_) => Ok(0),
        Err(_) => Err(unsupported('*', a, b)),
    };
    if let Some(text) = repeated.as_str() {
        let times = times()?;
        let bytes = (text.len() as u64).saturating_mul(times);
        pay(state, bytes)?;
        return Ok(text.repeat(usize::try_from(times).unwrap_or(0)).into());
    }
    if is_list(repeated) {
        let times = times()?;
        let mut items = Vec::new();
        if repeated.len() != Some(0) {
            for _ in 0..times {
                collect(state, repeated, &mut items)?;
            }
        }
        let product = match is_tuple(repeated) {
            true => Value::from(Tuple::new(items)),
            false => items.into(),
        };
        look(state, &product)?;
        return Ok(product);
    }
    match numbers(a, b) {
        Some(Numbers::Integers(a, b)) => integer(a.checked_mul(b)),
        Some(Numbers::Floats(a, b)) => Ok((a * b).into()),
        None => Err(unsupported('*', a, b)),
    }
}

/// Pays for a text that a filter makes, before it makes it.
pub(crate) fn pay(state: &State, bytes: u64) -> Result<(), Error> {
    state.consume_fuel(bytes / TEXT)
}

/// Pays for values that a format may write `times` each.
fn repeat(state: &State, times: usize, values: &[Value]) -> Result<(), Error> {
    for value in values {
        let bytes = walk(state, value, 0)?;
        pay(state, bytes.saturating_mul(times as u64))?;
    }
    Ok(())
}

/// Looks at what a method of a text, list or map gets, and pays for what it may make of it.
pub(super) fn call(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<(), Error> {
    look(state, value)?;
    for arg in args {
        look(state, arg)?;
    }
    let Some(text) = value.as_str() else {
        return Ok(());
    };
    match name {
        "format" => {
            if is_wide(text) {
                return Err(too_large());
            }
            repeat(state, text.matches('{').count(), args)
        }
        // Each part of a text is an item of a list.
        "split" | "splitlines" => {
            let parts = match args.first().and_then(Value::as_str) {
                Some(separator) => text.matches(separator).count(),
                None => text.matches(char::is_whitespace).count(),
            };
            state.consume_fuel(parts as u64 / 2)
        }
        _ => Ok(()),
    }
}

/// Returns whether a format has a number that no width or precision needs.
fn is_wide(format: &str) -> bool {
    let mut numbers = format.split(|c: char| !c.is_ascii_digit());
    numbers.any(|number| match number.parse::<usize>() {
        Ok(width) => width > WIDTH,
        Err(_) => !number.is_empty(),
    })
}
