//! Chat templates: Hugging Face semantics, and limits.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::*;

fn render_with(
    source: &str,
    messages: &Value,
    tools: Option<&Value>,
    extra: Value,
) -> Result<String, String> {
    let mut tokens = Map::new();
    tokens.insert("bos_token".into(), "<s>".into());
    tokens.insert("eos_token".into(), "</s>".into());
    let template = ChatTemplate::new(source, tokens).map_err(|error| error.to_string())?;
    let messages: Vec<Message> = messages
        .as_array()
        .unwrap()
        .iter()
        .map(|message| Message::from_json(message.clone()).unwrap())
        .collect();
    let Value::Object(extra) = extra else { panic!("extra is an object") };
    // 2024-07-26, a Friday.
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_721_995_200);
    let options = RenderOptions { tools, extra, ..RenderOptions::new(now) };
    template.render(&messages, &options).map_err(|error| error.to_string())
}

fn render(source: &str) -> String {
    let messages =
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]);
    render_with(source, &messages, None, json!({})).unwrap()
}

fn failure(source: &str) -> String {
    let error = render_with(source, &json!([]), None, json!({})).unwrap_err();
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn blocks_trim_white_space_as_in_jinja2() {
    let source = "A\n  {% if true %}\n  B\n  {% endif %}\nC {# note #}\n{{ 'D' }}\n\n";
    assert_eq!(render(source), "A\n  B\nC D\n");
    assert_eq!(
        render("{%- for m in messages -%}\n {{ m.role }} \n{%- endfor -%}"),
        "userassistant"
    );
}

#[test]
fn python_values_print_as_in_python() {
    assert_eq!(
        render("{{ none }} {{ true }} {{ 1.0 }} {{ missing }}|{{ [1, 'a'] }}"),
        "None True 1.0 |[1, 'a']"
    );
    assert_eq!(render("{{ {'a': none, 'b': [false]} }}"), "{'a': None, 'b': [False]}");
    assert_eq!(render("{{ true | string }}"), "True");
    assert_eq!(render("{{ messages[0] }}"), "{'role': 'user', 'content': 'hi'}");
    assert_eq!(render("{{ tools is none }} {{ documents is none }}"), "True True");
}

#[test]
fn python_methods_work() {
    let source = "{{ ' a '.strip() }}{{ 'x</t>y'.split('</t>')[-1] }}{{ 'ab'.startswith('a') }}\
        {{ messages[-1].get('content') }}{{ messages[0].get('nope') }}{{ 'ab'[::-1] }}\
        {% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}";
    assert_eq!(render(source), "ayTrueyoNonebarole=user;content=hi;");
    assert_eq!(
        render("{{ 'a-b'.replace('-', '+') }}{{ 'A'.lower() }}{{ 'x\\n'.rstrip('\\n') }}"),
        "a+bax"
    );
}

/// Each with what Python prints.
#[test]
fn methods_are_those_of_python() {
    let cases = [
        ("'äb</t>c'.find('</t>')", "2"),
        ("'äbb'.rfind('b')", "2"),
        ("'ab'.find('c')", "-1"),
        ("'äb'.index('b')", "1"),
        ("'abb'.rindex('b')", "2"),
        ("['a', 'b'].index('b')", "1"),
        ("'aXb'.removeprefix('a').removesuffix('b').removesuffix('c')", "X"),
        ("'a=b=c'.partition('=') | list", "['a', '=', 'b=c']"),
        ("'a=b=c'.rpartition('=') | list", "['a=b', '=', 'c']"),
        ("'abc'.partition('=') | list", "['abc', '', '']"),
        ("'abc'.rpartition('=') | list", "['', '', 'abc']"),
        ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
        ("'a,b,c'.rsplit(',')", "['a', 'b', 'c']"),
        ("'  a  b c '.rsplit()", "['a', 'b', 'c']"),
        ("'  a  b c '.rsplit(none, 1)", "['  a  b', 'c']"),
        ("'-5'.zfill(4) ~ '7'.zfill(3) ~ 'abc'.zfill(2)", "-005007abc"),
        ("'a'.ljust(3) ~ 'b'.rjust(3, '.')", "a  ..b"),
        ("'aBß'.swapcase()", "AbSS"),
        ("'Straße'.casefold()", "strasse"),
        ("{'a': 1}.copy()", "{'a': 1}"),
        ("''.isdigit()", "False"),
        ("'12'.isdigit()", "True"),
    ];
    for (expression, expected) in cases {
        assert_eq!(render(&format!("{{{{ {expression} }}}}")), expected, "{expression}");
    }
    assert!(failure("{{ 'a'.index('b') }}").ends_with("substring not found"));
    assert!(failure("{{ [1].index(2) }}").ends_with("2 is not in the list"));
    assert!(failure("{{ 'a'.ljust(99999999999) }}").ends_with("limit is 67108864"));
    assert!(failure("{{ 'a'.rsplit('') }}").ends_with("empty separator"));
}

/// What jinja2 3.1 says.
#[test]
fn tests_of_types_are_those_of_jinja2() {
    let values = ["none", "missing", "'abc'", "[1]", "{}", "1", "true", "range(2)", "[1][:1]"];
    let verdicts = |test: &str| {
        let one = |value: &&str| format!("{{{{ 1 if {value} is {test} else 0 }}}}");
        render(&values.iter().map(one).collect::<String>())
    };
    assert_eq!(verdicts("iterable"), "011110011");
    assert_eq!(verdicts("sequence"), "011110011");
    assert_eq!(verdicts("number"), "000001100");
    assert_eq!(verdicts("mapping"), "000010000");
    assert_eq!(render("{{ 'T' if tools is iterable and tools | length > 0 else 'F' }}"), "F");
}

#[test]
fn loops_scopes_and_macros_work() {
    let source = "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}\
        {% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}";
    assert_eq!(render(source), "013");
    let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}";
    assert_eq!(render(source), "2");
    let source =
        "{% macro f(x, y='d') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}{{ f('a', y='b') }}";
    assert_eq!(render(source), "<ad><ab>");
    assert_eq!(
        render(
            "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{% endfor %}"
        ),
        "1True"
    );
}

#[test]
fn generation_blocks_leave_only_their_content() {
    let source = "{% for m in messages %}\n{%- generation -%}\n [{{ m.content }}] \n{%- endgeneration %}\n{% endfor %}";
    assert_eq!(render(source), "[hi][yo]");
    assert_eq!(render("{% generation %}\nx\n{% endgeneration %}\ny"), "x\ny");
    assert_eq!(
        render("{# {% generation %} #}{% raw %}{% generation %}{% endraw %}"),
        "{% generation %}"
    );
    assert_eq!(render("{% raw %}{# {% endraw %}{% generation %}a{% endgeneration %}"), "{# a");
}

#[test]
fn tojson_is_json_dumps() {
    let tools = json!([{"b": 1, "a": "<é & 'x'>\u{7}\"\\", "f": 1e20, "n": null, "l": [], "o": {}, "t": [true, 1.5]}]);
    let dump = |source: &str| render_with(source, &json!([]), Some(&tools), json!({})).unwrap();
    assert_eq!(
        dump("{{ tools[0] | tojson }}"),
        r#"{"b": 1, "a": "<é & 'x'>\u0007\"\\", "f": 1e+20, "n": null, "l": [], "o": {}, "t": [true, 1.5]}"#
    );
    assert_eq!(
        dump("{{ tools[0].t | tojson(indent=2) }}{{ tools[0].l | tojson(indent=2) }}"),
        "[\n  true,\n  1.5\n][]"
    );
    assert_eq!(
        dump(
            "{{ {'b': [1], 'a': 'é🙂'} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}"
        ),
        r#"{"a":"\u00e9\ud83d\ude42","b":[1]}"#
    );
    assert_eq!(dump("{{ {1: 2} | tojson }}"), r#"{"1": 2}"#);
    assert!(failure("{{ missing | tojson }}").contains("undefined is not JSON serializable"));
}

#[test]
fn variables_reach_the_template() {
    let source =
        "{{ bos_token }}{{ add_generation_prompt }}{{ thinking }}{{ strftime_now('%d %b %Y') }}";
    let text = render_with(source, &json!([]), None, json!({"thinking": false})).unwrap();
    assert_eq!(text, "<s>TrueFalse26 Jul 2024");
    let text = render_with("{{ bos_token }}", &json!([]), None, json!({"bos_token": "X"})).unwrap();
    assert_eq!(text, "X");
    let error = render_with("", &json!([]), None, json!({"messages": 1})).unwrap_err();
    assert_eq!(error, "chat template variable messages is reserved");
}

#[test]
fn content_may_be_parts() {
    let source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
        {% for p in m.content %}{% if p.type == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}";
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "a"},
        {"type": "image"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}]);
    assert_eq!(render_with(source, &messages, None, json!({})).unwrap(), "abc");
    for bad in [
        json!("x"),
        json!({"content": "x"}),
        json!({"role": "user", "content": 5}),
        json!({"role": "user", "content": ["x"]}),
    ] {
        assert!(Message::from_json(bad.clone()).is_err(), "{bad}");
    }
    let message =
        Message::from_json(json!({"role": "assistant", "content": null, "tool_calls": []}))
            .unwrap();
    assert_eq!(message.fields().len(), 3);
}

#[test]
fn named_templates_serve_tools() {
    let text = br#"{"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}"#;
    let config = TokenizerConfig::from_json_bytes(text).unwrap();
    let template = ChatTemplate::from_config(&config).unwrap();
    let mut options = RenderOptions::new(SystemTime::UNIX_EPOCH);
    assert_eq!(template.render(&[], &options).unwrap(), "plain");
    let tools = json!([]);
    options.tools = Some(&tools);
    assert_eq!(template.render(&[], &options).unwrap(), "tools");
    let error = ChatTemplate::from_config(&TokenizerConfig::default()).unwrap_err();
    assert_eq!(error.to_string(), "model has no chat template");
}

#[test]
fn the_end_may_be_left_open() {
    let template =
        ChatTemplate::new("x{% if add_generation_prompt %}>{% endif %}", Map::new()).unwrap();
    let mut options = RenderOptions::new(SystemTime::UNIX_EPOCH);
    assert_eq!(template.render(&[], &options).unwrap(), "x>");
    options.generation_prompt = GenerationPrompt::Omit;
    assert_eq!(template.render(&[], &options).unwrap(), "x");
}

#[test]
fn errors_name_the_problem() {
    assert_eq!(
        failure("{{ raise_exception('roles must\nalternate') }}"),
        "chat template: roles must alternate"
    );
    let source = "{% macro f() %}{{ raise_exception('inner') }}{% endmacro %}{{ f() }}";
    assert_eq!(failure(source), "chat template: inner");
    let error = failure("a\n{% if %}");
    assert!(error.starts_with("chat template line 2: syntax error"), "{error}");
    assert!(failure("{{ nothing.there }}").starts_with("chat template line 1: undefined value"));
    assert!(failure("{% include '/etc/passwd' %}").contains("template not found"));
    let error = failure(&"x".repeat(MAX_TEMPLATE_BYTES + 1));
    assert_eq!(error, "chat template has 262145 bytes, limit is 262144");
}

#[test]
fn hostile_templates_end() {
    let error =
        failure("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}");
    assert_eq!(error, "chat template line 1: takes more than 1000000 operations");
    let error = failure("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    assert!(error.contains("recursion limit"), "{error}");
    let error = failure("{% set x = 'y' * 100000 %}{% for i in range(99999) %}{{ x }}{% endfor %}");
    assert!(error.ends_with("writes more than 67108864 bytes"), "{error}");
}

#[test]
fn deep_values_do_not_break_the_stack() {
    let nest = |brackets: usize| {
        let (open, close) = ("[".repeat(brackets), "]".repeat(brackets));
        format!(
            "{{% set ns = namespace(x=1) %}}{{% for i in range(99999) %}}{{% set ns.x = {open}ns.x{close} %}}{{% endfor %}}"
        )
    };
    let error = failure(&nest(40));
    assert!(error.ends_with("takes more than 1000000 operations"), "{error}");
    let shallow = nest(40).replace("99999", "18000");
    let error = failure(&(shallow.clone() + "{{ ns.x }}"));
    assert!(error.contains("deeper than 100 levels"), "{error}");
    let error = failure(&(shallow.clone() + "{{ ns.x | tojson }}"));
    assert!(error.contains("deeper than 100 levels"), "{error}");
    let text = render(&(shallow.clone() + "{{ (ns.x ~ '') | length > 100 }}{{ ns.x == [ns.x] }}"));
    assert_eq!(text, "TrueFalse");
}

/// Chains that nest an expression as deep as the longest template can; those that the compiler folds anew
/// at each level are shorter, since that takes time.
#[test]
fn deep_templates_do_not_break_the_stack() {
    let most = MAX_TEMPLATE_BYTES - 100;
    let chains = [
        ("{{ ", "not ", "1 }}", most),
        ("{{ ", "-", "1 }}", most),
        ("{{ ", "1+", "1 }}", most),
        ("{{ ", "x if x else ", "1 }}", most),
        ("{{ x", " if 1", " }}", most),
        ("{{ x", "|string", " }}", most),
        ("{{ x", ".a", " }}", most),
        ("{{ x", "[0]", " }}", most),
        ("{{ x", "()", " }}", most),
        ("{{ x", " is a", " }}", most),
        ("{{ x is a ", "-", "1 }}", most),
        ("{% if 0 %}", "{%elif 0%}", "{% endif %}", most),
        ("{% set x", ".a", " = 1 %}", most),
        ("{% filter ", "e|", "e %}{% endfilter %}", most),
        ("{{ ", "x+", "x }}", 10_000),
        ("{{ ", "-", "x }}", 10_000),
        ("{{ ", "x or ", "x }}", 10_000),
    ];
    for (start, link, end, bytes) in chains {
        let source = format!("{start}{}{end}", link.repeat(bytes / link.len()));
        let compiled = ChatTemplate::new(&source, Map::new());
        assert!(compiled.is_ok(), "{link}: {compiled:?}");
        // It gives something or is refused in words.
        if let Err(error) = render_with(&source, &json!([]), None, json!({})) {
            assert!(error.starts_with("chat template line 1: "), "{link}: {error}");
        }
    }
}
