//! Templates that try to take all memory, all time or all of the stack, and the same values by the
//! engine's own operators and by those that [`rewrite`] puts in their place.

use std::process::Command;
use std::time::{Duration, Instant};

use super::jinja::environment;
use super::source::rewrite;
use super::*;

/// Names the variable that makes a process render the templates, and print its peak memory.
const CHILD: &str = "ELASTIC_LORA_TEMPLATES_IN_CHILD";

/// Most memory of a process that renders them, in kB.
const PEAK: u64 = 128 << 10;

/// A loop that changes `n.a` again and again, and what is done with it at the end.
fn grown(start: &str, times: usize, step: &str, end: &str) -> String {
    format!(
        "{{% set n = namespace(a={start}, b={start}) %}}{{% for i in range({times}) %}}{{% set n.a = {step} \
         %}}{{% endfor %}}{end}"
    )
}

/// Templates, and whether each must be refused. The others may give some text in a bounded time.
pub(crate) fn templates() -> Vec<(String, bool)> {
    let mut all = Vec::new();
    let mut refused = |source: String| all.push((source, true));
    // Lists, tuples and maps that double, by each way to make one.
    for step in [
        "n.a + n.a",
        "n.a * 2",
        "2 * n.a",
        "[n.a, n.a]",
        "(n.a, n.a)",
        "{'a': n.a, 'b': n.a}",
        "dict(a=n.a, b=n.a)",
        "[n.a] + [n.a]",
        "[n.a] * 2",
        "(n.a + [1]) + (n.a + [1])",
        "[n.a, n.a]|list",
        "[1, 1]|map('default', n.a)|list + [n.a, n.a]",
        "[[1], [2]]|map(attribute='x', default=n.a)|list",
        "[n.a]|batch(2, n.a)|list",
        "[n.a]|slice(2, n.a)|list",
        "[n.a, n.a][:]",
        "[n.a, n.a]|reverse",
        "[n.a if true else 0, n.a if true else 0]",
        "[\"'\", n.a, n.a, '\\'']",
    ] {
        for end in [
            "",
            "{{ n.a }}",
            "{{ n.a ~ '' }}",
            "{{ n.a|string }}",
            "{{ n.a|tojson(indent=80) }}",
            "{{ n.a == n.b }}",
            "{{ n.a in [n.b] }}",
            "{{ {n.a: 1} }}",
            "{{ n.a|join(n.a) }}",
        ] {
            refused(grown("[1]", 60, step, end));
        }
    }
    // Texts that double.
    for step in [
        "n.a + n.a",
        "n.a ~ n.a",
        "n.a * 2",
        "2 * n.a",
        "[n.a, n.a]|join",
        "[n.a, n.a]|join('')",
        "n.a.join([n.a, n.a, n.a])",
        "n.a|replace('a', 'aa')",
        "n.a.replace('a', 'aa')",
        "'%s%s'|format(n.a, n.a)",
        "'%(x)s%(x)s'|format(x=n.a)",
        "'{0}{0}'.format(n.a)",
        "n.a|indent(n.a|length, true)",
        "n.a|tojson ~ n.a|tojson",
    ] {
        refused(grown("'aaaa'", 80, step, "{{ n.a|length }}"));
    }
    for source in [
        "{{ 'x' * 10**12 }}",
        "{{ [1] * 10**12 }}",
        "{{ 10**12 * [1] }}",
        "{{ (1, 2) * 10**9 }}",
        "{{ ['x' * 9999] * 99999 }}",
        "{{ 'a\\na'|indent(1000000000000) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '%.1000000000f'|format(1.5) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:>99999999999999999999999}'.format(1) }}",
        "{{ range(10**9)|list }}",
        "{{ range(99999)|list * 999 }}",
        "{{ ['a']|batch(10**12, 'x')|list }}",
        "{{ ['a']|slice(10**12)|list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set x = [1, 2] + [3, a] %}{% for b in x * 99 %}{% endfor %}{% endfor %}",
        // Macros, loops and blocks that call themselves.
        "{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f([1]) }}",
        "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{% call f() %}x{% endcall %}",
        // A namespace in itself, by each way.
        "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
        "{% set n = namespace() %}{% set n.a = [n] %}{{ n }}",
        "{% set n = namespace() %}{% set n.a = {'x': n} %}{{ n }}",
        "{% set n = namespace() %}{% set n.a = dict(x=n) %}{{ n }}",
        "{% set n = namespace() %}{% set m = namespace(x=n) %}{{ m }}",
        "{% set n = namespace() %}{% set m = namespace({'x': n}) %}{{ m }}",
        "{% set n = namespace() %}{% set n.a, n.b = n, n %}{{ n }}",
        "{% set n = namespace() %}{% set n.a | default(n, true) %}{% endset %}{{ n }}",
        "{% set n = namespace() %}{% set n.a = n if true else n %}{{ n }}",
        "{% set n = namespace() %}{% set n.a = none or n %}{{ n }}",
        // Names of the checks.
        "{% macro elora_add(a, b) %}{% endmacro %}{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a \
         = n.a + n.a %}{% endfor %}{{ n.a }}",
    ] {
        refused(source.into());
    }
    // A namespace that grows after it was put into another.
    refused(
        "{% set a = namespace(x=1) %}{% set b = [a, a, a, a] %}{% set a.x = range(9999)|list %}{{ b }}"
            .into(),
    );
    let attributes: String = (0..5000)
        .map(|i| format!("{{% set n.x{i} = s %}}"))
        .collect();
    refused(format!(
        "{{% set n = namespace() %}}{{% set s = 'x' * 99999 %}}{attributes}{{{{ n }}}}"
    ));
    let many = ["s"; 100_000].join(" + ");
    refused(format!("{{% set s = range(9999)|list %}}{{{{ {many} }}}}"));
    refused(format!(
        "{{% set s = range(9999)|list %}}{{{{ [{}] }}}}",
        ["s"; 100_000].join(",")
    ));
    refused(format!("{{{{ {} }}}}", "(1 - ".repeat(9999)));
    refused(format!("{{{{ {} }}}}", "[".repeat(99_999)));
    refused(format!("{{{{ {}1 }}}}", "-".repeat(99_999)));
    refused(format!("{{{{ {}1 }}}}", "not ".repeat(99_999)));
    refused(format!("{{{{ s{} }}}}", "[1:]".repeat(99_999)));
    refused(format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(50_000)));
    let mut allowed = |source: String| all.push((source, false));
    for step in [
        "n.a[:]",
        "n.a[::-1]",
        "n.a|reverse",
        "n.a|list",
        "[n.a]",
        "{'a': n.a}",
        "n.a + [i]",
        "n.a|sort",
        "n.a|unique|list",
    ] {
        allowed(grown("[1]", 99_999, step, "{{ n.a }}"));
    }
    allowed(grown("{'a': 1}", 99_999, "n.a.items()", "{{ n.a }}"));
    for (chain, times) in [
        (" + 1", 200_000),
        (" - 1 + 1", 100_000),
        (" ~ 'a'", 150_000),
        (".a", 400_000),
        ("|int", 200_000),
        (" is int", 140_000),
        (" and 1", 160_000),
        (" == 1", 160_000),
        (" ** 1", 160_000),
        (", 1", 300_000),
        ("()", 300_000),
    ] {
        allowed(format!("{{% set x = 1{} %}}", chain.repeat(times)));
        allowed(format!("{{% if 1{} %}}{{% endif %}}", chain.repeat(240)));
    }
    allowed(format!("{{{{ [1{}] }}}}", ", 1".repeat(300_000)));
    let branches = "{% elif a %}".repeat(80_000);
    allowed(format!("{{% if 1 %}}{branches}{{% endif %}}"));
    let branches = "{% elif a %}".repeat(240) + "{% if 1 %}";
    allowed(format!("{{% if 1 %}}{}", branches.repeat(100)));
    allowed("{{ x }}".repeat(140_000));
    allowed("{% if 1 %}".repeat(99_999));
    allowed("{{ 'a b c d '.split(' ') }}{{ ('a ' * 99999).split(' ')|length }}".into());
    allowed(
        "{% for i in range(99999) %}{% macro f(x=i) %}{{ x }}{% endmacro %}{% endfor %}".into(),
    );
    allowed("{% set k = 'x' * 1000000 %}{% for i in range(99999) %}{% if {k: 1}[k] %}{% endif %}{% endfor %}".into());
    allowed("{% set a = range(9999)|list %}{% set b = range(9999)|list %}{% for i in range(99999) %}{{ a == b }}{{ a \
             in [b] }}{{ [a]|unique|list|length }}{% endfor %}".into());
    all
}

#[test]
fn no_template_takes_all_memory_time_or_stack() {
    let name = "data::chat::hostile::no_template_takes_all_memory_time_or_stack";
    are_bounded(name, templates, |source| {
        let template = ChatTemplate::new(source, "t.jinja").map_err(|e| e.to_string())?;
        let text = template.render(&[Message::user("a")], &[], false);
        text.map(|text| text.len()).map_err(|e| e.to_string())
    });
}

/// Renders templates that may have to be refused, in a process of its own, whose peak memory is that
/// of the templates. `test` is the name of the calling test. `render` returns the length of a text.
pub(crate) fn are_bounded(
    test: &str,
    templates: impl FnOnce() -> Vec<(String, bool)>,
    render: impl Fn(&str) -> std::result::Result<usize, String>,
) {
    if std::env::var_os(CHILD).is_none() {
        return in_child(test);
    }
    let mut wrong = Vec::new();
    for (source, must_fail) in templates() {
        let begin = Instant::now();
        let result = render(&source);
        let shown: String = source.chars().take(200).collect();
        if begin.elapsed() > Duration::from_secs(20) {
            wrong.push(format!("{:?}: {shown}", begin.elapsed()));
        }
        match result {
            Ok(len) if must_fail => wrong.push(format!("{len} bytes: {shown}")),
            Err(error) if std::env::var(CHILD).is_ok_and(|v| v == "show") => {
                println!("{:?} {error}: {shown}", begin.elapsed());
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak: u64 = peak
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        println!("peak {peak} kB");
        assert!(peak < PEAK, "{peak} kB");
    }
}

/// Runs a test of this crate in a process of its own.
fn in_child(test: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{error}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn operators_give_the_values_of_the_engine() {
    use rand::{RngExt, SeedableRng};
    let atoms = [
        "1",
        "2.5",
        "-3",
        "true",
        "none",
        "'ab'",
        "\"c'd\"",
        "x",
        "s",
        "l",
        "m.k",
        "m['k']",
        "l[0]",
        "s[1:]",
        "l[:2]",
        "l[::-1]",
        "missing",
        "(1, 2)",
        "(x,)",
        "[]",
        "[x, 's']",
        "{'a': x}",
        "10000000000",
        "0",
        "s.upper()",
        "m.items()",
        "loop",
        "l|length",
        "s|upper",
        "l|join('-')",
        "(x is defined)",
        "l|first",
        "(x is not none)",
        "x is divisibleby 2",
        "s.split('b')",
        "range(3)",
        "l|map('string')|list",
        "l|select('odd')|list",
        "m|tojson",
        "l|sort(reverse=true)",
        "f(x)",
        "f(x, b=s)",
        "().a",
    ];
    let operators = [
        "+", "-", "*", "/", "//", "%", "~", "==", "!=", "in", "not in", "and", "or", "**", "+",
        "*", "~",
    ];
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    fn expression(
        rng: &mut rand_chacha::ChaCha8Rng,
        depth: usize,
        atoms: &[&str],
        ops: &[&str],
    ) -> String {
        if depth == 0 || rng.random_range(0..6) == 0 {
            return atoms[rng.random_range(0..atoms.len())].to_string();
        }
        let mut part = || expression(rng, depth - 1, atoms, ops);
        let (a, b) = (part(), part());
        let op = ops[rng.random_range(0..ops.len())];
        match rng.random_range(0..9) {
            0 => format!("({a}) {op} {b}"),
            1 => format!("{a} {op} ({b})"),
            2 => format!("[{a}, {b}]"),
            3 => format!("(not {a}) {op} {b}"),
            4 => format!("{a} if {b} else {a}"),
            5 => format!("({a})|default({b})"),
            _ => format!("{a} {op} {b}"),
        }
    }
    let context =
        serde_json::json!({"x": 5, "s": "abab", "l": [3, 1, 2], "m": {"k": "v", "n": [1]}});
    let context = minijinja::Value::from(Serde(context));
    let mut env = environment(0);
    env.set_fuel(Some(100_000));
    let (mut equal, mut refused) = (0, 0);
    for _ in 0..crate::io::testing::rounds(4000) {
        let text = expression(&mut rng, 3, &atoms, &operators);
        let text = format!(
            "{{% macro f(a, b='z') %}}{{{{ a }}}}{{{{ b }}}}{{% endmacro %}}{{% set v = {text} %}}{{{{ v }}}}|{{{{ \
             {text} }}}}{{% if {text} %}}y{{% else %}}n{{% endif %}}"
        );
        let plain = env.render_str(&text, context.clone());
        let again = rewrite(&text).map(|source| env.render_str(&source.text, context.clone()));
        match (plain, again) {
            (Ok(plain), Ok(Ok(again))) => {
                assert_eq!(plain, again, "{text}\n{}", rewrite(&text).unwrap().text);
                equal += 1;
            }
            (Err(_), Err(_) | Ok(Err(_))) => refused += 1,
            // The engine drops what a short circuit leaves out, and bounds texts itself.
            (plain, again) => panic!("{text}\n{plain:?}\n{again:?}\n{:?}", rewrite(&text)),
        }
    }
    assert!(equal > 500 && refused > 100, "{equal}, {refused}");
}

#[test]
fn tags_that_follow_no_grammar_are_refused_by_line() {
    for (source, reason) in [
        (
            "{{ 1\n+ }}",
            "unexpected end of the tag, expected a value (line 1)",
        ),
        ("a\n{{ 'a }}", "a text has no end (line 2)"),
        ("{{ a $ b }}", "unexpected character `$`"),
        ("{% sets x = 1 %}", "unknown statement sets"),
        ("{{ (1, }}", "unexpected `}`"),
        ("{{ 1) }}", "unexpected `)`"),
        ("{{ 1 + not a }}", "unexpected `not`, expected a value"),
        ("{{ a b }}", "unexpected `b`, expected the end of the tag"),
        ("{{ a[1:2:3:4] }}", "more than three parts"),
        ("{% raw %}a", "`raw` has no end"),
        ("{# a", "a comment has no end"),
        ("{% for a b in c %}{% endfor %}", "expected in"),
    ] {
        let message = ChatTemplate::new(source, "t.jinja")
            .unwrap_err()
            .to_string();
        assert!(message.contains(reason), "{source}: {message}");
    }
    let kept = "{#- a -#}\n{%- raw -%} {{ a + b }} {%- endraw %}{{ 'a' }}é{ {";
    let written = "{#- a -#}\n{%- raw -%} {{ a + b }} {%- endraw %}{{ 'a' }}é{ {";
    assert_eq!(rewrite(kept).unwrap().text, written);
    // Lines stay what they were.
    let source = "{{ 1 +\n 1\n}}\n{{ nothing.at.all }}";
    let message = ChatTemplate::new(source, "t.jinja")
        .and_then(|template| template.render(&[], &[], false))
        .unwrap_err()
        .to_string();
    assert!(message.contains("chat:4"), "{message}");
}
