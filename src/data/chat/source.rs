//! The text of a template, written anew with the checks that bound its values.
//!
//! The engine's fuel pays for texts, but not for what a list *holds*: thirty lines that double a
//! list by `+` or `[a, a]` make one of a billion items for the price of thirty. So the tags are
//! parsed here, by the engine's own grammar, and written again with filters of [`bounds`] around
//! each operation whose cost depends on what its operands hold:
//!
//! | template | written as |
//! |---|---|
//! | `a + b`, `a * b` | `a\|elora_add(b)`, `a\|elora_mul(b)` |
//! | `[a, b]`, `(a, b)`, `{a: b}` | `([a, b]\|elora_made)` |
//! | `a[1:]` | `(a[1:]\|elora_list)` |
//! | `a == b`, `a in b`, `a ~ b`, `a[b]` | with `\|elora_seen` behind operands that are not constant |
//! | `a\|join(b)` | `a\|elora_seen\|join(b\|elora_seen)\|elora_made` |
//! | `{% set a.b = c %}` | `{% set a.b = c\|elora_kept %}` |
//!
//! What is written holds no `+` and no `*` of the template, and nothing that was not understood:
//! a tag that does not follow the grammar is an error. Names of filters cannot be assigned to, so
//! that a template cannot put something else in the place of the checks.
//!
//! [`bounds`]: super::bounds

use super::jinja::MARKS;

/// Deepest nesting of expressions. Each level takes up to three levels of the engine's parser,
/// which allows 150.
const DEPTH: usize = 40;

/// Filters whose cost does not depend on what the items of their input hold, and whose result
/// holds no more than it.
const SHALLOW: [&str; 17] = [
    "abs",
    "attr",
    "count",
    "d",
    "default",
    "first",
    "float",
    "int",
    "items",
    "last",
    "length",
    "list",
    "reject",
    "rejectattr",
    "round",
    "select",
    "selectattr",
];

/// Most operations around one another in what the engine gets. Its compiler calls itself for each,
/// without a bound of its own; `a + b + c` are two.
const HEIGHT: usize = 250;

/// Most `elif` that are open at a time, for the same reason.
const BRANCHES: usize = 250;

/// A template that is written anew.
#[derive(Debug, PartialEq)]
pub(crate) struct Source {
    /// The text that the engine gets.
    pub(crate) text: String,
    /// Whether it had tags `generation`, which became tags that print [`MARKS`].
    pub(crate) generation: bool,
}

type Result<T> = std::result::Result<T, String>;

/// Writes a template anew. See the module.
///
/// # Errors
/// Returns a sentence with the line if a tag does not follow the grammar.
pub(crate) fn rewrite(source: &str) -> Result<Source> {
    let mut out = Source {
        text: String::with_capacity(source.len()),
        generation: false,
    };
    let mut rest = source;
    let mut branches = Branches::default();
    while let Some(at) = tag_start(rest) {
        let (before, tail) = rest.split_at(at);
        out.text.push_str(before);
        let len = tag(tail, &mut out, &mut branches).map_err(|reason| {
            let before = &source[..source.len() - tail.len()];
            format!("{reason} (line {})", before.matches('\n').count() + 1)
        })?;
        rest = &tail[len..];
    }
    out.text.push_str(rest);
    Ok(out)
}

/// Writes the expression of a template that is one `{{ expression }}` anew, with a check of its value.
/// Returns `None` if the template is anything else.
///
/// # Errors
/// Returns a sentence if the expression does not follow the grammar.
pub(crate) fn expression(source: &str) -> Result<Option<String>> {
    if !source.starts_with("{{") {
        return Ok(None);
    }
    let mut lexer = Lexer {
        text: source,
        at: 2 + control(source[2..].chars().next()).len(),
        close: "}}",
    };
    let (tokens, _) = lexer.tokens()?;
    if lexer.at < source.len() {
        return Ok(None);
    }
    let mut parser = Parser {
        tokens: &tokens,
        at: 0,
        depth: 0,
    };
    let piece = parser.expression()?;
    parser.end()?;
    Ok(Some(piece.guarded("elora_seen")?.text))
}

/// The `elif` of each `if` that is open.
#[derive(Default)]
struct Branches {
    open: Vec<usize>,
    all: usize,
}

impl Branches {
    fn tag(&mut self, name: &str) -> Result<()> {
        match name {
            "if" => self.open.push(0),
            "elif" => {
                if let Some(last) = self.open.last_mut() {
                    *last += 1;
                }
                self.all += 1;
            }
            "endif" => self.all -= self.open.pop().unwrap_or(0),
            _ => {}
        }
        match self.all > BRANCHES {
            true => Err(format!("more than {BRANCHES} `elif` are open")),
            false => Ok(()),
        }
    }
}

/// Returns where the next tag or comment begins.
fn tag_start(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut pairs = bytes.windows(2);
    pairs.position(|pair| matches!(pair, b"{{" | b"{%" | b"{#"))
}

/// Writes the tag that `text` begins with, and returns its length.
fn tag(text: &str, out: &mut Source, branches: &mut Branches) -> Result<usize> {
    let open = &text[..2];
    let left = control(text[2..].chars().next());
    let inside = 2 + left.len();
    if open == "{#" {
        let end = text[inside..].find("#}").ok_or("a comment has no end")?;
        let len = inside + end + 2;
        out.text.push_str(&text[..len]);
        return Ok(len);
    }
    if open == "{%"
        && let Some(len) = basic_tag(&text[inside..], "raw", false)
    {
        let len = raw_end(text, inside + len).ok_or("`raw` has no end")?;
        out.text.push_str(&text[..len]);
        return Ok(len);
    }
    let close = if open == "{{" { "}}" } else { "%}" };
    let mut lexer = Lexer {
        text,
        at: inside,
        close,
    };
    let (tokens, right) = lexer.tokens()?;
    let name = match tokens.as_slice() {
        [Token::Name(name)] if open == "{%" => *name,
        _ => "",
    };
    match name {
        "generation" => {
            out.generation = true;
            let mark = MARKS[0];
            let tag = format!("{{%{left} with %}}{{{{ {mark} }}}}{{% with {right}%}}");
            out.text.push_str(&tag);
        }
        "endgeneration" => {
            let mark = MARKS[1];
            let tag = format!("{{%{left} endwith %}}{{{{ {mark} }}}}{{% endwith {right}%}}");
            out.text.push_str(&tag);
        }
        _ => {
            let mut parser = Parser {
                tokens: &tokens,
                at: 0,
                depth: 0,
            };
            if let (Some(Token::Name(name)), "{%") = (tokens.first(), open) {
                branches.tag(name)?;
            }
            let inner = if open == "{{" {
                parser.expression()?.text
            } else {
                parser.statement()?
            };
            parser.end()?;
            // Lines that the tag had more, so that errors name the line of the template.
            let lines = text[..lexer.at].matches('\n').count();
            let lines = "\n".repeat(lines.saturating_sub(inner.matches('\n').count()));
            let tag = format!("{open}{left} {inner}{lines} {right}{close}");
            out.text.push_str(&tag);
        }
    }
    Ok(lexer.at)
}

fn control(c: Option<char>) -> &'static str {
    match c {
        Some('-') => "-",
        Some('+') => "+",
        _ => "",
    }
}

/// Returns the length of the tag `name` that `text` goes on with, up to `%}`, or `None`.
fn basic_tag(text: &str, name: &str, with_control: bool) -> Option<usize> {
    let mut rest = text;
    if with_control {
        rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    }
    rest = rest.trim_ascii_start().strip_prefix(name)?;
    rest = rest.trim_ascii_start();
    rest = rest.strip_prefix(['-', '+']).unwrap_or(rest);
    Some(text.len() - rest.strip_prefix("%}")?.len())
}

/// Returns where the tag `endraw` ends, from `at` on.
fn raw_end(text: &str, mut at: usize) -> Option<usize> {
    loop {
        at += text[at..].find("{%")? + 2;
        if let Some(len) = basic_tag(&text[at..], "endraw", true) {
            return Some(at + len);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    Name(&'a str),
    /// A text with its quotes, as it was written.
    Text(&'a str),
    Number(&'a str),
    Sign(&'a str),
}

/// Signs of two characters stand before those of one.
const SIGNS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", ".", ",", ":", "~", "|", "=", ">",
    "<", "(", ")", "[", "]", "{", "}",
];

struct Lexer<'a> {
    text: &'a str,
    at: usize,
    close: &'static str,
}

impl<'a> Lexer<'a> {
    /// Reads tokens up to the end of the tag, and returns its whitespace control as well.
    fn tokens(&mut self) -> Result<(Vec<Token<'a>>, &'static str)> {
        let (mut tokens, mut open) = (Vec::new(), 0_usize);
        loop {
            let rest = &self.text[self.at..];
            self.at += rest.len() - rest.trim_ascii_start().len();
            let rest = rest.trim_ascii_start();
            if open == 0 {
                let right = control(rest.chars().next());
                if rest[right.len()..].starts_with(self.close) {
                    self.at += right.len() + self.close.len();
                    return Ok((tokens, right));
                }
            }
            let Some(c) = rest.chars().next() else {
                return Err("a tag has no end".into());
            };
            let token = match c {
                '\'' | '"' => Token::Text(text_token(rest, c as u8).ok_or("a text has no end")?),
                '0'..='9' => Token::Number(self.number(rest)),
                'a'..='z' | 'A'..='Z' | '_' => {
                    let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
                    Token::Name(&rest[..end.unwrap_or(rest.len())])
                }
                _ => {
                    let sign = SIGNS.into_iter().find(|sign| rest.starts_with(sign));
                    Token::Sign(sign.ok_or_else(|| format!("unexpected character `{c}`"))?)
                }
            };
            self.at += match token {
                Token::Name(t) | Token::Text(t) | Token::Number(t) | Token::Sign(t) => t.len(),
            };
            match token {
                Token::Sign("(" | "[" | "{") => open += 1,
                Token::Sign(sign @ (")" | "]" | "}")) => {
                    open = open.checked_sub(1).ok_or(format!("unexpected `{sign}`"))?;
                }
                _ => {}
            }
            tokens.push(token);
        }
    }

    /// A number: digits, with a base, a fraction and an exponent where they are whole.
    fn number(&self, rest: &'a str) -> &'a str {
        let bytes = rest.as_bytes();
        let digits = |from: usize| {
            let rest = bytes.get(from..).unwrap_or_default();
            let is_digit = |b: &&u8| b.is_ascii_digit() || **b == b'_';
            from + rest.iter().take_while(is_digit).count()
        };
        if let [b'0', b'b' | b'B' | b'o' | b'O' | b'x' | b'X', ..] = bytes {
            let is_digit = |b: &&u8| b.is_ascii_hexdigit() || **b == b'_';
            return &rest[..2 + bytes[2..].iter().take_while(is_digit).count()];
        }
        let mut end = digits(0);
        // A number behind a dot is an index: `a.1.0` is `a[1][0]`.
        if self.text[..self.at].ends_with('.') {
            return &rest[..end];
        }
        if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
            end = digits(end + 1);
        }
        if let Some(b'e' | b'E') = bytes.get(end) {
            let sign = matches!(bytes.get(end + 1), Some(b'+' | b'-'));
            let first = end + 1 + usize::from(sign);
            if bytes.get(first).is_some_and(u8::is_ascii_digit) {
                end = digits(first);
            }
        }
        &rest[..end]
    }
}

/// Returns the text with its quotes that `rest` begins with.
fn text_token(rest: &str, quote: u8) -> Option<&str> {
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if byte == quote => return Some(&rest[..=at]),
            _ => {}
        }
    }
    None
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Written out in the template: no larger than it, and looking at it needs no check.
    Constant,
    /// What `.`, `[` and `(` may follow.
    Primary,
    /// What filters may follow.
    Filtered,
    /// What needs parentheses.
    Compound,
}

/// An expression that is written anew.
#[derive(Debug)]
struct Piece {
    text: String,
    kind: Kind,
    /// Operations around one another.
    height: usize,
}

impl Piece {
    fn new(text: impl Into<String>, kind: Kind) -> Self {
        let text = text.into();
        let height = 0;
        Self { text, kind, height }
    }

    fn is_constant(&self) -> bool {
        self.kind == Kind::Constant
    }

    /// Writes an operation with another operand behind this one.
    fn with(mut self, before: &str, right: &Piece, after: &str, kind: Kind) -> Result<Self> {
        for part in [before, &right.text, after] {
            self.text.push_str(part);
        }
        self.kind = kind;
        self.above(right.height)
    }

    /// Writes an operation behind this operand.
    fn and(self, more: &str, kind: Kind) -> Result<Self> {
        self.with(more, &Self::new("", kind), "", kind)
    }

    /// Puts this piece around another one, by their heights.
    fn above(mut self, height: usize) -> Result<Self> {
        self.height = self.height.max(height) + 1;
        match self.height > HEIGHT {
            true => Err(format!("more than {HEIGHT} operations around one another")),
            false => Ok(self),
        }
    }

    fn wrapped(self, open: &str, close: &str) -> Result<Self> {
        Self::new(format!("{open}{}{close}", self.text), Kind::Primary).above(self.height)
    }

    /// Makes an expression one that filters can follow.
    fn operand(self) -> Result<Self> {
        match self.kind {
            Kind::Compound => self.wrapped("(", ")"),
            _ => Ok(self),
        }
    }

    /// Puts a filter behind an expression that is not constant.
    fn guarded(self, filter: &str) -> Result<Self> {
        if self.is_constant() {
            return Ok(self);
        }
        self.operand()?.and(&format!("|{filter}"), Kind::Filtered)
    }
}

struct Parser<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
    depth: usize,
}

impl<'a> Parser<'_, 'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).copied()
    }

    fn next(&mut self) -> Option<Token<'a>> {
        let token = self.peek();
        self.at += 1;
        token
    }

    fn is_name(&self, name: &str) -> bool {
        self.peek() == Some(Token::Name(name))
    }

    fn is_sign(&self, sign: &str) -> bool {
        self.peek() == Some(Token::Sign(sign))
    }

    fn take_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn take_sign(&mut self, sign: &str) -> bool {
        let found = self.is_sign(sign);
        self.at += usize::from(found);
        found
    }

    /// Takes one of some signs.
    fn take_any(&mut self, signs: &[&'static str]) -> Option<&'static str> {
        let sign = signs.iter().copied().find(|sign| self.is_sign(sign));
        self.at += usize::from(sign.is_some());
        sign
    }

    fn expect(&mut self, sign: &str) -> Result<()> {
        match self.take_sign(sign) {
            true => Ok(()),
            false => Err(self.unexpected(&format!("`{sign}`"))),
        }
    }

    fn name(&mut self) -> Result<&'a str> {
        match self.peek() {
            Some(Token::Name(name)) => {
                self.at += 1;
                Ok(name)
            }
            _ => Err(self.unexpected("a name")),
        }
    }

    fn unexpected(&self, expected: &str) -> String {
        match self.peek() {
            Some(Token::Name(t) | Token::Text(t) | Token::Number(t) | Token::Sign(t)) => {
                let shown: String = t.chars().take(40).collect();
                format!("unexpected `{shown}`, expected {expected}")
            }
            None => format!("unexpected end of the tag, expected {expected}"),
        }
    }

    fn end(&self) -> Result<()> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.unexpected("the end of the tag")),
        }
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == DEPTH {
            return Err(format!("expressions are nested more than {DEPTH} times"));
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    fn expression(&mut self) -> Result<Piece> {
        self.deeper(|this| {
            let mut piece = this.or()?;
            while this.take_name("if") {
                piece = piece.with(" if ", &this.or()?, "", Kind::Compound)?;
                if this.take_name("else") {
                    piece = piece.with(" else ", &this.expression()?, "", Kind::Compound)?;
                }
            }
            Ok(piece)
        })
    }

    fn or(&mut self) -> Result<Piece> {
        self.words("or", Self::and)
    }

    fn and(&mut self) -> Result<Piece> {
        self.words("and", Self::not)
    }

    fn words(&mut self, word: &str, inner: fn(&mut Self) -> Result<Piece>) -> Result<Piece> {
        let mut piece = inner(self)?;
        while self.take_name(word) {
            piece = piece.with(&format!(" {word} "), &inner(self)?, "", Kind::Compound)?;
        }
        Ok(piece)
    }

    fn not(&mut self) -> Result<Piece> {
        if !self.take_name("not") {
            return self.compare();
        }
        let inner = self.deeper(Self::not)?;
        Piece::new("not ", Kind::Compound).with("", &inner, "", Kind::Compound)
    }

    fn compare(&mut self) -> Result<Piece> {
        let mut operands = vec![self.sum()?];
        let mut signs = Vec::new();
        loop {
            let sign = if let Some(sign) = self.take_any(&["==", "!=", "<=", ">=", "<", ">"]) {
                sign
            } else if self.take_name("in") {
                "in"
            } else if self.take_name("not") {
                match self.take_name("in") {
                    true => "not in",
                    false => return Err(self.unexpected("`in`")),
                }
            } else {
                break;
            };
            signs.push(sign);
            operands.push(self.sum()?);
        }
        if signs.is_empty() {
            return operands.pop().ok_or_else(|| self.unexpected("a value"));
        }
        // Comparing with a constant costs no more than its size.
        let constant: Vec<bool> = operands.iter().map(Piece::is_constant).collect();
        let open = |i: usize| constant.get(i) == Some(&false);
        let mut piece = Piece::new("", Kind::Compound);
        for (i, operand) in operands.into_iter().enumerate() {
            let compared = open(i) && (open(i + 1) || (i > 0 && open(i - 1)));
            let operand = match compared {
                true => operand.guarded("elora_seen")?,
                false => operand,
            };
            if i > 0 {
                piece = piece.and(&format!(" {} ", signs[i - 1]), Kind::Compound)?;
            }
            piece = piece.with("", &operand, "", Kind::Compound)?;
        }
        Ok(piece)
    }

    fn sum(&mut self) -> Result<Piece> {
        let mut piece = self.concat()?;
        while let Some(sign) = self.take_any(&["+", "-"]) {
            let right = self.concat()?;
            piece = match sign {
                "+" => {
                    let left = piece.operand()?;
                    left.with("|elora_add(", &right, ")", Kind::Filtered)?
                }
                _ => piece.with(" - ", &right, "", Kind::Compound)?,
            };
        }
        Ok(piece)
    }

    fn concat(&mut self) -> Result<Piece> {
        let first = self.product()?;
        if !self.is_sign("~") {
            return Ok(first);
        }
        let mut piece = first.guarded("elora_seen")?;
        while self.take_sign("~") {
            let right = self.product()?.guarded("elora_seen")?;
            piece = piece.with(" ~ ", &right, "", Kind::Compound)?;
        }
        Ok(piece)
    }

    fn product(&mut self) -> Result<Piece> {
        let mut piece = self.power()?;
        while let Some(sign) = self.take_any(&["*", "/", "//", "%"]) {
            let right = self.power()?;
            piece = match sign {
                "*" => {
                    let left = piece.operand()?;
                    left.with("|elora_mul(", &right, ")", Kind::Filtered)?
                }
                _ => piece.with(&format!(" {sign} "), &right, "", Kind::Compound)?,
            };
        }
        Ok(piece)
    }

    fn power(&mut self) -> Result<Piece> {
        let mut piece = self.filtered()?;
        while self.take_sign("**") {
            piece = piece.with(" ** ", &self.filtered()?, "", Kind::Compound)?;
        }
        Ok(piece)
    }

    /// A value with its filters and tests.
    fn filtered(&mut self) -> Result<Piece> {
        let mut piece = self.negated()?;
        loop {
            if self.take_sign("|") {
                piece = self.filter(Some(piece))?;
            } else if self.take_name("is") {
                piece = self.test(piece)?;
            } else {
                return Ok(piece);
            }
        }
    }

    fn negated(&mut self) -> Result<Piece> {
        if !self.take_sign("-") {
            let primary = self.primary()?;
            return self.postfix(primary);
        }
        let inner = self.deeper(Self::negated)?;
        let kind = match inner.kind {
            Kind::Constant => Kind::Constant,
            _ => Kind::Compound,
        };
        Piece::new("-", kind).with("", &inner, "", kind)
    }

    /// A filter behind `value`, or the first one of a chain that takes the text of a block.
    fn filter(&mut self, value: Option<Piece>) -> Result<Piece> {
        let name = self.name()?;
        let args = match self.is_sign("(") {
            true => self.args(Some("elora_seen"))?,
            false => Piece::new("", Kind::Filtered),
        };
        let deep = !SHALLOW.contains(&name);
        let piece = match value {
            Some(value) if deep => value.guarded("elora_seen")?,
            Some(value) => value.operand()?,
            None => Piece::new("", Kind::Filtered),
        };
        let bar = if piece.text.is_empty() { "" } else { "|" };
        let piece = piece.with(&format!("{bar}{name}"), &args, "", Kind::Filtered)?;
        match deep {
            true => piece.and("|elora_made", Kind::Filtered),
            false => Ok(piece),
        }
    }

    fn test(&mut self, value: Piece) -> Result<Piece> {
        let not = if self.take_name("not") { "not " } else { "" };
        let name = self.name()?;
        let args = if self.is_sign("(") {
            self.args(Some("elora_seen"))?
        } else if self.is_argument() {
            self.negated()?.guarded("elora_seen")?.wrapped("(", ")")?
        } else {
            Piece::new("", Kind::Filtered)
        };
        let value = match args.text.is_empty() {
            true => value.operand()?,
            false => value.guarded("elora_seen")?,
        };
        // A test that is negated is an operation like `not`.
        let kind = match not.is_empty() {
            true => Kind::Filtered,
            false => Kind::Compound,
        };
        value.with(&format!(" is {not}{name}"), &args, "", kind)
    }

    /// Returns whether an argument of a test follows, without parentheses.
    fn is_argument(&self) -> bool {
        match self.peek() {
            Some(Token::Name(name)) => !matches!(name, "and" | "or" | "else" | "is"),
            Some(Token::Text(_) | Token::Number(_)) => true,
            Some(Token::Sign(sign)) => matches!(sign, "+" | "-" | "[" | "{"),
            None => false,
        }
    }

    fn primary(&mut self) -> Result<Piece> {
        let constant = |text: &str| Ok(Piece::new(text, Kind::Constant));
        let Some(token) = self.peek() else {
            return Err(self.unexpected("a value"));
        };
        match token {
            Token::Name("true" | "True" | "false" | "False" | "none" | "None") => {
                let name = self.name()?;
                constant(name)
            }
            Token::Name("and" | "else" | "if" | "in" | "is" | "not" | "or") => {
                Err(self.unexpected("a value"))
            }
            Token::Name(name) => {
                self.at += 1;
                Ok(Piece::new(name, Kind::Primary))
            }
            Token::Number(number) => {
                self.at += 1;
                constant(number)
            }
            Token::Text(_) => {
                let mut texts = Vec::new();
                while let Some(Token::Text(text)) = self.peek() {
                    texts.push(text);
                    self.at += 1;
                }
                constant(&texts.join(" "))
            }
            Token::Sign("(") => self.parentheses(),
            Token::Sign("[") => {
                self.at += 1;
                let items = self.items("]", false)?;
                literal("[", &items, "]")
            }
            Token::Sign("{") => {
                self.at += 1;
                let items = self.items("}", true)?;
                literal("{", &items, "}")
            }
            Token::Sign(_) => Err(self.unexpected("a value")),
        }
    }

    fn parentheses(&mut self) -> Result<Piece> {
        self.at += 1;
        if self.take_sign(")") {
            return Ok(Piece::new("()", Kind::Primary));
        }
        let first = self.expression()?;
        if self.take_sign(")") {
            let is_constant = first.is_constant();
            let mut piece = first.wrapped("(", ")")?;
            if is_constant {
                piece.kind = Kind::Constant;
            }
            return Ok(piece);
        }
        self.expect(",")?;
        let rest = self.items(")", false)?;
        let kind = match first.is_constant() {
            true => rest.kind,
            false => Kind::Compound,
        };
        literal("(", &first.with(", ", &rest, "", kind)?, ")")
    }

    /// Returns values, or pairs of them, up to `close`: a constant one if they all are.
    fn items(&mut self, close: &str, pairs: bool) -> Result<Piece> {
        let (mut text, mut constant, mut height) = (String::new(), true, 0);
        while !self.take_sign(close) {
            if !text.is_empty() {
                self.expect(",")?;
                if self.take_sign(close) {
                    break;
                }
                text.push_str(", ");
            }
            let mut item = self.expression()?;
            if pairs {
                self.expect(":")?;
                let value = self.expression()?;
                let kind = match item.is_constant() {
                    true => value.kind,
                    false => Kind::Compound,
                };
                item = item.with(": ", &value, "", kind)?;
            }
            constant &= item.is_constant();
            height = height.max(item.height);
            text.push_str(&item.text);
        }
        let kind = match constant {
            true => Kind::Constant,
            false => Kind::Compound,
        };
        Piece::new(text, kind).above(height)
    }

    fn postfix(&mut self, mut piece: Piece) -> Result<Piece> {
        loop {
            if self.take_sign(".") {
                let name = match self.next() {
                    Some(Token::Name(name) | Token::Number(name)) => name,
                    _ => {
                        self.at -= 1;
                        return Err(self.unexpected("a name or an index"));
                    }
                };
                // A number, a dot and a name would be read as another number.
                let base = match piece.kind {
                    Kind::Constant => piece.wrapped("(", ")")?,
                    _ => piece,
                };
                piece = base.and(&format!(".{name}"), Kind::Primary)?;
            } else if self.take_sign("[") {
                piece = self.subscript(piece)?;
            } else if self.is_sign("(") {
                let args = self.args(None)?;
                piece = piece.with("", &args, "", Kind::Primary)?;
            } else {
                return Ok(piece);
            }
        }
    }

    fn subscript(&mut self, piece: Piece) -> Result<Piece> {
        let mut parts = vec![String::new()];
        let (mut only, mut height) = (None, 0);
        loop {
            if self.take_sign("]") {
                break;
            }
            if self.take_sign(":") {
                if parts.len() == 3 {
                    return Err("a slice has more than three parts".into());
                }
                parts.push(String::new());
                continue;
            }
            let index = self.expression()?;
            let last = parts.len() - 1;
            if !parts[last].is_empty() {
                return Err(self.unexpected("`]`"));
            }
            parts[last].clone_from(&index.text);
            height = height.max(index.height);
            only = Some(index);
        }
        if parts.len() > 1 {
            let close = format!("[{}]|elora_list)", parts.join(":"));
            return piece.above(height)?.wrapped("(", &close);
        }
        let index = only.ok_or("an empty subscript")?.guarded("elora_seen")?;
        piece.with("[", &index, "]", Kind::Primary)
    }

    /// Arguments of a call in their parentheses, each with a filter behind it.
    fn args(&mut self, guard: Option<&str>) -> Result<Piece> {
        self.expect("(")?;
        let (mut text, mut height) = (String::from("("), 0);
        while !self.take_sign(")") {
            if text.len() > 1 {
                self.expect(",")?;
                if self.take_sign(")") {
                    break;
                }
                text.push_str(", ");
            }
            if let Some(splat) = self.take_any(&["**", "*"]) {
                text.push_str(splat);
            } else if let [Token::Name(name), Token::Sign("="), ..] =
                self.tokens.get(self.at..).unwrap_or_default()
            {
                text.push_str(name);
                text.push('=');
                self.at += 2;
            }
            let value = self.expression()?;
            let value = match guard {
                Some(guard) => value.guarded(guard)?,
                None => value,
            };
            height = height.max(value.height);
            text.push_str(&value.text);
        }
        text.push(')');
        Piece::new(text, Kind::Primary).above(height)
    }

    fn statement(&mut self) -> Result<String> {
        let name = self.name().map_err(|_| self.unexpected("a statement"))?;
        Ok(match name {
            "if" | "elif" => format!("{name} {}", self.or()?.text),
            "for" => self.loop_tag()?,
            "set" => self.set_tag()?,
            "with" => {
                let mut text = String::from("with");
                let mut first = true;
                while self.peek().is_some() {
                    if !first {
                        self.expect(",")?;
                        text.push(',');
                    }
                    first = false;
                    let target = self.targets()?;
                    self.expect("=")?;
                    text.push_str(&format!(" {target} = {}", self.expression()?.text));
                }
                text
            }
            "macro" => format!("macro {}{}", self.name()?, self.parameters()?),
            "call" => {
                let parameters = match self.is_sign("(") {
                    true => self.parameters()?,
                    false => String::new(),
                };
                format!("call{parameters} {}", self.expression()?.text)
            }
            "filter" => format!("filter {}", self.chain()?),
            "autoescape" | "do" => format!("{name} {}", self.expression()?.text),
            "else" | "endif" | "endfor" | "endset" | "endwith" | "endmacro" | "endcall"
            | "endfilter" | "endautoescape" | "break" | "continue" => name.into(),
            _ => return Err(format!("unknown statement {name}")),
        })
    }

    fn loop_tag(&mut self) -> Result<String> {
        let targets = self.targets()?;
        if !self.take_name("in") {
            return Err(self.unexpected("`in`"));
        }
        let mut text = format!("for {targets} in {}", self.or()?.text);
        if self.take_name("if") {
            text = format!("{text} if {}", self.expression()?.text);
        }
        if self.take_name("recursive") {
            text.push_str(" recursive");
        }
        Ok(text)
    }

    fn set_tag(&mut self) -> Result<String> {
        let targets = self.targets()?;
        if self.take_sign("|") {
            let kept = if targets.contains('.') {
                "|elora_kept"
            } else {
                ""
            };
            return Ok(format!("set {targets} | {}{kept}", self.chain()?));
        }
        if self.peek().is_none() {
            return Ok(format!("set {targets}"));
        }
        self.expect("=")?;
        let mut value = self.expression()?;
        if self.is_sign(",") {
            let mut items = value;
            while self.take_sign(",") {
                let item = match self.peek() {
                    Some(_) => self.expression()?,
                    None => Piece::new("", Kind::Compound),
                };
                items = items.with(", ", &item, "", Kind::Compound)?;
            }
            value = literal("(", &items, ")")?;
        }
        if targets.contains('.') {
            value = value.guarded("elora_kept")?;
        }
        Ok(format!("set {targets} = {}", value.text))
    }

    /// Names that are assigned to, with dots, commas and parentheses.
    fn targets(&mut self) -> Result<String> {
        let mut text = self.name_or_parenthesis()?;
        while let Some(token) = self.peek() {
            match token {
                Token::Name("in") => break,
                Token::Name(name) => {
                    if text.ends_with(|c: char| c == '_' || c.is_ascii_alphanumeric()) {
                        text.push(' ');
                    }
                    text.push_str(name);
                }
                Token::Sign(sign @ ("." | "," | "(" | ")")) => text.push_str(sign),
                _ => break,
            }
            self.at += 1;
        }
        Ok(text)
    }

    fn name_or_parenthesis(&mut self) -> Result<String> {
        if self.take_sign("(") {
            return Ok("(".into());
        }
        self.name().map(String::from)
    }

    /// Parameters of a macro with their defaults.
    fn parameters(&mut self) -> Result<String> {
        self.expect("(")?;
        let mut text = String::from("(");
        while !self.take_sign(")") {
            if text.len() > 1 {
                self.expect(",")?;
                if self.take_sign(")") {
                    break;
                }
                text.push_str(", ");
            }
            text.push_str(self.name()?);
            if self.take_sign("=") {
                text.push('=');
                text.push_str(&self.expression()?.text);
            }
        }
        text.push(')');
        Ok(text)
    }

    /// Filters of the text of a block.
    fn chain(&mut self) -> Result<String> {
        let mut piece = self.filter(None)?;
        while self.take_sign("|") {
            piece = self.filter(Some(piece))?;
        }
        Ok(piece.text)
    }
}

/// A list, tuple or map. One that holds constants only is a constant.
fn literal(open: &str, items: &Piece, close: &str) -> Result<Piece> {
    match items.is_constant() {
        true => Piece::new(open, Kind::Constant).with("", items, close, Kind::Constant),
        false => {
            let open = format!("({open}");
            let close = format!("{close}|elora_made)");
            Piece::new(open, Kind::Primary).with("", items, &close, Kind::Primary)
        }
    }
}
