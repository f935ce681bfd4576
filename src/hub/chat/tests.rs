//! Compares rendered templates with transformers', converts rows of every format, and checks the errors for templates
//! and rows that are refused.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use peft_grammar::model::{Task, TaskKind};
use serde_json::{Map, Value as Json, json};
use tempfile::TempDir;

use super::{Chat, Conversation, Rendered, date, engine, marks};
use crate::data::{DataError, Tokenizer};

/// 2024-07-06 15:04:05
const NOW: i64 = 1_720_278_245;

/// The fixtures that `tests/interop/chat_fixtures.py` wrote.
fn fixtures() -> Json {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/chat.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn folder(tokenizer: &Json, files: &[(&str, Json)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, content) in files {
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn load(folder: &TempDir) -> Result<Tokenizer, DataError> {
    let kind =
        TaskKind::Generation { special: vec![], template: vec![], target: String::new(), each: vec![], pack: false };
    Tokenizer::load(folder.path(), &Task { name: "t".into(), max_tokens: 64, bidirectional: false, kind }, 100_000)
}

/// A tokenizer with a template in its settings.
fn tokenizer(fixtures: &Json, template: &Json, tokens: &Json) -> Tokenizer {
    let mut settings = tokens.clone();
    settings["chat_template"] = template.clone();
    settings["tokenizer_class"] = "PreTrainedTokenizerFast".into();
    load(&folder(&fixtures["tokenizer"], &[("tokenizer_config.json", settings)])).unwrap()
}

fn row(value: &Json) -> &Map<String, Json> {
    value.as_object().unwrap()
}

fn conversation(value: Json) -> Conversation {
    Conversation::of(row(&value)).unwrap_or_else(|why| panic!("{why}: {value}"))
}

/// A conversation in which the user and the assistant alternate.
fn turns(texts: &[&str]) -> Conversation {
    let message =
        |(at, text): (usize, &&str)| json!({"role": if at % 2 == 0 { "user" } else { "assistant" }, "content": text});
    conversation(json!({"messages": texts.iter().enumerate().map(message).collect::<Vec<_>>()}))
}

fn chat(template: &str) -> Result<Chat, String> {
    let templates = super::Templates {
        from: "`T`".into(),
        named: vec![("default".into(), template.into())],
        tokens: vec![("eos_token".into(), "</s>".into())],
    };
    Chat::new(&templates, vec!["</s>".into(), "<|im_end|>".into(), "<|end|>".into(), "<|user|>".into()], NOW)
}

/// The texts that carry the loss.
fn learned(rendered: &Rendered) -> Vec<&str> {
    rendered.loss_ranges.iter().map(|range| &rendered.text[range.clone()]).collect()
}

#[test]
fn eight_families_are_rendered_and_encoded_as_by_transformers() {
    let fixtures = fixtures();
    let (mut compared, mut without_tools, mut wrong) = (0, 0, vec![]);
    for (family, about) in fixtures["families"].as_object().unwrap() {
        let [plain, marked] = ["template", "marked"].map(|key| tokenizer(&fixtures, &about[key], &about["tokens"]));
        let [unmarked, by_marks] = [&plain, &marked].map(|t| Chat::at(t, fixtures["now"].as_i64().unwrap()).unwrap());
        for (name, expected) in about["cases"].as_object().unwrap() {
            let place = format!("{family}, {name}");
            let conversation = conversation(fixtures["conversations"][name].clone());
            let (found, with_marks) = match (unmarked.render(&conversation), by_marks.render(&conversation)) {
                (Ok(found), Ok(with_marks)) => (found, with_marks),
                // Templates without tools leave calls out; transformers does so silently, peftc refuses the row.
                (Err(one), Err(other)) if expected["error"].is_null() => {
                    assert!(name.contains("call") || name == "tools", "{place}: {one}");
                    assert!(
                        one.starts_with("the chat template does not write the call of `weather`"),
                        "{place}: {one}"
                    );
                    assert_eq!(one, other, "{place}");
                    without_tools += 1;
                    continue;
                }
                (Err(one), Err(other)) => {
                    let said = expected["error"].as_str().unwrap_or_else(|| panic!("{place}: {one}"));
                    let detail = |why: &str| why.rsplit(", line ").next().unwrap_or_default().to_owned();
                    assert_eq!(detail(&one), detail(&other), "{place}");
                    // Errors of Python itself have Python's own text, so only those that the template raises are
                    // compared.
                    assert!(
                        said.contains("no attribute") || one == format!("the chat template refuses it: {said}"),
                        "{one}"
                    );
                    continue;
                }
                (one, other) => panic!("{place}: {one:?}, with marks {other:?}"),
            };
            if found.text != expected["text"] || with_marks.text != expected["text"] {
                wrong.push(format!("{place}: {:?}, in transformers {}", found.text, expected["text"]));
                continue;
            }
            let encoded = plain.encode_spans(&[(&found.text, &found.loss_ranges[..])]).unwrap().remove(0);
            let masked = marked.encode_spans(&[(&with_marks.text, &with_marks.loss_ranges[..])]).unwrap().remove(0);
            let mut spans: Vec<[usize; 2]> = masked.spans.iter().map(|span| [span.start, span.end]).collect();
            // The marked range ends with a character of four tokens, of which transformers' mask holds only the first.
            if place == "SmolLM2, unicode" {
                spans[0][1] -= 3;
            }
            if json!(encoded.ids) != expected["ids"] || json!(masked.ids) != expected["ids"] {
                wrong.push(format!("{place}: {:?}, in transformers {}", encoded.ids, expected["ids"]));
            }
            if json!(spans) != expected["masks"] {
                wrong.push(format!("{place}: masks {spans:?}, in transformers {}", expected["masks"]));
            }
            // Without marks, a range begins where the marked range begins, and it ends after the turn's end token.
            let (turns, marks) = (learned(&found), learned(&with_marks));
            // Both ways find the same number of ranges.
            assert_eq!(turns.len(), marks.len(), "{place}");
            for ((turn, mark), (range, at)) in
                turns.iter().zip(marks).zip(found.loss_ranges.iter().zip(&with_marks.loss_ranges))
            {
                // Qwen's marked range of a call includes the line break at the end of the generation prompt.
                let before = &found.text[at.start..range.start];
                assert!(before.is_empty() || before == "\n", "{place}: {before:?}");
                let rest = turn
                    .strip_prefix(&mark[before.len()..])
                    .unwrap_or_else(|| panic!("{place}: {turn:?} and {mark:?}"));
                assert!(["", "\n", "<|im_end|>\n", "<|endoftext|>"].contains(&rest), "{place}: {rest:?}");
            }
            compared += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{compared} conversations");
    assert!(compared > 85 && without_tools == 5, "{compared}, {without_tools} without tools");
}

#[test]
fn expressions_evaluate_as_in_transformers() {
    let fixtures = fixtures();
    let messages = conversation(fixtures["conversations"]["several"].clone());
    let mut wrong = vec![];
    for probe in fixtures["probes"].as_array().unwrap() {
        let template = probe["template"].as_str().unwrap();
        let tokens =
            [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.to_owned(), token.to_owned()));
        let found = super::Engine::new(template, "`T`".into(), &tokens, fixtures["now"].as_i64().unwrap())
            .and_then(|engine| engine.render(&messages.values(), None, false));
        match (probe["text"].as_str(), found) {
            (Some(text), Ok(found)) if text == found => {}
            (None, Err(_)) => {}
            (text, found) => wrong.push(format!("{template}: {found:?}, in transformers {text:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn generation_tags_are_found_only_in_tags() {
    let (text, marked) =
        marks::rewrite("{%- generation -%}a{%endgeneration+%}{# {% generation %} #}{{ '{% generation %}' }}");
    let rewritten = "{%- call generation_mark() -%}a{%endcall+%}{# {% generation %} #}{{ '{% generation %}' }}";
    assert_eq!((text.as_str(), marked), (rewritten, true));
    for text in
        ["{% raw %}{% generation %}{% endraw %}", "{% set generation = 1 %}", "{", "{%", "{{ '", "{# a", "é{% ü %}"]
    {
        assert_eq!(marks::rewrite(text), (text.to_owned(), false), "{text}");
    }
    assert_eq!(marks::strip_markers("a[b[c]]d[]", '[', ']'), ("abcd".into(), vec![1..3, 4..4]));
}

#[test]
fn dates_are_formatted_as_by_strftime() {
    for (now, expected) in [
        (0, "1970-01-01 Thursday 001"),
        (NOW, "2024-07-06 Saturday 188"),
        (951_782_400, "2000-02-29 Tuesday 060"),
        (4_107_542_400, "2100-03-01 Monday 060"),
        (-86_400, "1969-12-31 Wednesday 365"),
    ] {
        assert_eq!(date::format("%Y-%m-%d %A %j", now).as_deref(), Ok(expected));
    }
    assert_eq!(date::format("%d %b %y, %-I:%M %p; %e%%", NOW).as_deref(), Ok("06 Jul 24, 3:04 PM;  6%"));
    let said = date::format("%Q", 0).unwrap_err();
    assert_eq!(said, "`strftime_now` has `%Q` in `%Q`, which is not supported");
}

/// The templates, the variables and the notes are read from every place that may hold them, in transformers' order.
#[test]
fn templates_are_found_in_every_place() {
    let fixtures = fixtures();
    let named = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "K"}]);
    let settings = |template: Json| ("tokenizer_config.json", json!({"chat_template": template, "eos_token": "</s>"}));
    type Case<'a> = (&'a [(&'a str, Json)], &'a str, &'a str);
    let cases: [Case; 6] = [
        (&[settings("K".into())], "K", "tokenizer_config.json"),
        (&[settings("K".into()), ("chat_template.jinja", "J".into())], "J", "chat_template.jinja"),
        (&[settings(named.clone())], "K", "tokenizer_config.json"),
        (
            &[
                settings(named),
                ("additional_chat_templates/tool_use.jinja", "U".into()),
                ("chat_template.jinja", "J".into()),
            ],
            "J",
            "chat_template.jinja",
        ),
        (&[settings(Json::Null), ("chat_template.json", json!({"chat_template": "P"}))], "P", "chat_template.json"),
        (&[settings("K".into()), ("chat_template.json", json!({"chat_template": "P"}))], "K", "tokenizer_config.json"),
    ];
    for (files, expected, place) in cases {
        let folder = folder(&fixtures["tokenizer"], files);
        let tokenizer = load(&folder).unwrap();
        assert_eq!(tokenizer.chat_template(), Some(expected));
        let templates = tokenizer.templates().unwrap();
        assert!(templates.from.contains(place), "{}", templates.from);
        assert_eq!(templates.tokens, [("eos_token".to_owned(), "</s>".to_owned())]);
    }
    // A conversation with tools uses the template `tool_use`, as in transformers.
    let both = json!([{"name": "tool_use", "template": "{% generation %}T{% endgeneration %}"},
        {"name": "default", "template": "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}"}]);
    let chat = Chat::at(&tokenizer(&fixtures, &both, &json!({})), NOW).unwrap();
    let mut talk = turns(&["a", "b"]);
    assert_eq!(chat.render(&talk).unwrap().text, "2024");
    talk.tools = Some(json!([{}]));
    assert_eq!(chat.render(&talk).unwrap().text, "T");
    assert_eq!(
        chat.notes(),
        [
            "the tokenizer has the chat templates `tool_use`, `default`; `default` is used, `tool_use` for rows with \
             tools",
            "the chat template may write the date, which is 2024-07-06 (UTC) for the whole run; a run that is resumed \
             on another day has other data unless `SOURCE_DATE_EPOCH` fixes the date"
        ]
    );
    let refusal = |files: &[(&str, Json)]| {
        let folder = folder(&fixtures["tokenizer"], files);
        let error = load(&folder).and_then(|tokenizer| Chat::at(&tokenizer, NOW)).err().unwrap().to_string();
        error.replace(&folder.path().display().to_string(), "DIR")
    };
    let said = refusal(&[]);
    assert!(
        said.starts_with("`DIR/tokenizer.json`: the tokenizer has no chat template") && said.contains("`--tokenizer`"),
        "{said}"
    );
    let said = refusal(&[settings(json!([{"name": "rag", "template": "R"}]))]);
    assert!(said.ends_with("has the templates `rag`, and none is called `default`: rename the one to use"), "{said}");
    let said = refusal(&[settings(json!(1))]);
    assert!(said.contains("its `chat_template` is 1, and should be a text"), "{said}");
    let said = refusal(&[settings(json!([{"name": "rag"}]))]);
    assert!(said.contains("should have a `name` and a `template`"), "{said}");
}

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn the_loss_is_on_the_text_after_the_generation_prompt() {
    let chat = chat(CHATML).unwrap();
    let talk = turns(&["Hi", "Hello", "<|im_end|></s>?", "No"]);
    let found = chat.render(&talk).unwrap();
    assert_eq!(learned(&found), ["Hello<|im_end|>\n", "No<|im_end|>\n"]);
    assert_eq!(found.special, 2);
    // A message with a weight of 0 carries no loss; a row in which all have it is refused.
    let mut row = json!({"messages": talk.messages});
    row["messages"][1]["weight"] = 0.into();
    assert_eq!(learned(&chat.render(&conversation(row.clone())).unwrap()), ["No<|im_end|>\n"]);
    row["messages"][3]["weight"] = 0.into();
    assert!(Conversation::of(self::row(&row)).unwrap_err().contains("nothing to learn"));
}

/// Text that a template writes only after the last message belongs to the last message's range.
#[test]
fn the_end_of_the_conversation_belongs_to_the_last_turn() {
    let template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}\
                    {% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}";
    let found = chat(template).unwrap().render(&turns(&["a", "b", "c", "d"])).unwrap();
    assert_eq!(learned(&found), ["b<|end|>", "d<|end|></s>"]);
}

#[test]
fn marked_ranges_respect_weights_and_whitespace_control() {
    let template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}\n  {%- generation -%}\n {{ \
                    m.content }}.{% endgeneration %}\n\n{% else %}{{ m.content }} {% endif %}{% endfor %}";
    let chat = chat(template).unwrap();
    let mut talk = turns(&["a", "b", "c", "d"]);
    assert_eq!(chat.render(&talk).unwrap().text, "user: a assistant: b.\nuser: c assistant: d.\n");
    assert_eq!(learned(&chat.render(&talk).unwrap()), ["b.", "d."]);
    talk.messages[1]["weight"] = 0.into();
    assert_eq!(learned(&chat.render(&talk).unwrap()), ["d."]);
    // The characters that delimit marks internally may occur in a message.
    talk.messages[3]["content"] = "\u{e000}\u{e001}".into();
    assert_eq!(learned(&chat.render(&talk).unwrap()), ["\u{e000}\u{e001}."]);
}

#[test]
#[allow(clippy::single_range_in_vec_init)]
fn byte_ranges_become_token_ranges() {
    let tokenizer = tokenizer(&fixtures(), &"".into(), &json!({}));
    let text = "the film 🙂 is";
    let all = tokenizer.encode(vec![text], false).unwrap().remove(0);
    let spans = |ranges: &[std::ops::Range<usize>]| tokenizer.encode_spans(&[(text, ranges)]).unwrap().remove(0);
    assert_eq!(spans(&[]).ids, all);
    let whole = 0..text.len();
    assert_eq!(spans(&[whole]).spans, [0..all.len()]);
    // A token that overlaps a range is in it, and so are all tokens of a character. The space before the character is a
    // token.
    let film = tokenizer.encode(vec!["the"], false).unwrap()[0].len();
    let face = tokenizer.encode(vec!["the film"], false).unwrap()[0].len();
    let after = all.len() - tokenizer.encode(vec![" is"], false).unwrap()[0].len();
    assert_eq!(spans(&[3..8]).spans, [film..face]);
    assert_eq!(spans(&[9..13]).spans, [face + 1..after]);
    assert_eq!(spans(&[0..3, 9..13]).spans, [0..film, face + 1..after]);
    assert!(spans(&[2..2]).spans.is_empty());
}

/// Templates that cannot be used are refused with the place and the reason.
#[test]
fn bad_templates_are_refused() {
    let talk = turns(&["a", "b", "c", "<think>x</think>d"]);
    for (template, said) in [
        ("a\n{% if %}", "`T`, line 2: syntax error: "),
        ("a\n\n{% for x in messages %}", "`T`, line 3: syntax error: "),
        ("{% generation %}", "`T`, line 1: syntax error: "),
        ("{% include 'x' %}", "`T`, line 1: syntax error: unknown statement include"),
        ("\n{{ messages | frobnicate }}", "`T`, line 2: unknown filter: "),
        ("{{ frobnicate() }}", "`T`, line 1: unknown function: "),
        ("{{ messages[0].content.frob() }}", "`T`, line 1: unknown method: "),
        ("{{ nothing.at_all }}", "`T`, line 1: undefined value"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "`T`, line 1: the template does not come to an end",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "`T`, line 1: invalid operation: recursion limit exceeded"),
        (
            "{% set ns = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "`T`, line 1: the template does not come",
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for a in range(24) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | \
             list }}",
            "`T`, line 1: the template does not come",
        ),
        ("{{ [1] | chain([2]) }}", "`T`, line 1: unknown filter: "),
        (
            "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
            "`T`, line 1: the template does not come to an end",
        ),
        ("{{ 'x' * 999999999 }}", "`T`, line 1: "),
        ("{{ ('x' * 99999).replace('x', 'y' * 99999) | length }}", "`T`, line 1: the template does not come to an end"),
        (
            "{% set ns = namespace(x=[]) %}{% for a in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | \
             tojson }}",
            "`T`, line 1: invalid operation: `tojson` of more than 100",
        ),
        ("{{ raise_exception('it is <so>') }}", "the chat template refuses it: it is <so>"),
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}",
            "the chat template has no generation prompt: it writes `<|assistant|>\\n` before",
        ),
        (
            "{% for m in messages %}{{ m.content if loop.last else m.content | replace('b', 'z') }}{% endfor %}",
            "message 2, the assistant's: the chat template writes it differently",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "message 2, the assistant's: the chat template writes what it answers",
        ),
        (
            "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}",
            "the chat template processes the text that it has marked",
        ),
        ("{% generation %}{% endgeneration %}x", "no token would carry the loss"),
    ] {
        let start = Instant::now();
        let found = chat(template).and_then(|chat| chat.render(&talk)).expect_err(template);
        assert!(found.starts_with(said), "{template}: {found}");
        assert!(start.elapsed() < Duration::from_secs(20), "{template}: {:?}", start.elapsed());
    }
}

/// Work that exceeds the time limit is an error, and no other work starts after it.
#[test]
fn work_that_does_not_end_is_given_up() {
    let (faulty, limit) = (AtomicBool::new(false), Duration::from_millis(20));
    assert_eq!(engine::run_with_limits(limit, &faulty, || Ok(1)), Ok(1));
    assert_eq!(engine::run_with_limits(limit, &faulty, || Err::<(), _>("so".into())), Err("so".into()));
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let said = engine::run_with_limits(limit, &faulty, move || held.recv().map_err(|e| e.to_string())).unwrap_err();
    assert!(said.starts_with("the chat template does not come to an end: it took 0 s"), "{said}");
    drop(hold);
    assert!(engine::run_with_limits(limit, &faulty, || Ok(1)).unwrap_err().contains("for another conversation"));
}

/// Nested lists, as deep as a template can build them within its limits, do not exhaust the stack.
#[test]
fn deeply_nested_values_do_not_exhaust_the_stack() {
    let template = |count: usize, value: &str, last: &str| {
        format!(
            "{{% set ns = namespace(x=[], y=[]) %}}{{% for a in range({count}) %}}{{% for b in range(1000) %}}\
             {{% set ns.x = {value} %}}{{% endfor %}}{{% endfor %}}{last}"
        )
    };
    for value in ["[ns.x]", "{'a': ns.x}"] {
        for last in [
            "",
            "{{ ns.x }}",
            "{{ ns.x | string }}",
            "{{ ns.x == [ns.x] }}",
            "{{ [ns.x, [ns.x]] | sort }}",
            "{{ ns.x | tojson }}",
        ] {
            let chat = chat(&template(100, value, last)).unwrap();
            let said = chat.render(&turns(&["a", "b"])).unwrap_err();
            println!("{value} {last}: {said}");
        }
    }
}

/// SmolLM2-135M-Instruct's own template renders to the text of transformers 5.23.
#[test]
fn smollm2_by_its_own_template() {
    let (Some(_), Some(file)) = (std::env::var_os("PEFTC_FULL"), std::env::var_os("PEFTC_SMOLLM2")) else { return };
    let kind =
        TaskKind::Generation { special: vec![], template: vec![], target: String::new(), each: vec![], pack: false };
    let task = Task { name: "t".into(), max_tokens: 64, bidirectional: false, kind };
    let tokenizer = Tokenizer::load(Path::new(&file), &task, 49_152).unwrap();
    let tokens = &tokenizer.templates().unwrap().tokens;
    for (name, token) in [("bos_token", "<|im_start|>"), ("eos_token", "<|im_end|>")] {
        assert!(tokens.contains(&(name.to_owned(), token.to_owned())), "{tokens:?}");
    }
    let chat = Chat::at(&tokenizer, NOW).unwrap();
    let found = chat.render(&turns(&["What is tea?", " A drink. "])).unwrap();
    assert_eq!(
        found.text,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\n A drink. <|im_end|>\n"
    );
    let mut talk = turns(&["Hi\n", "Zoë 🙂", "Bye", "Bye!"]);
    talk.messages.insert(0, json!({"role": "system", "content": "Be kind."}));
    let found = chat.render(&talk).unwrap();
    assert_eq!(
        found.text,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\nZoë \
         🙂<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n"
    );
    assert_eq!(learned(&found), ["Zoë 🙂<|im_end|>\n", "Bye!<|im_end|>\n"]);
    let encoded = tokenizer.encode_spans(&[(&found.text, &found.loss_ranges[..])]).unwrap().remove(0);
    let ends: Vec<i32> = encoded.spans.iter().map(|span| encoded.ids[span.end - 2]).collect();
    assert_eq!(ends, [2, 2], "the end of each turn, `<|im_end|>`");
}

/// Rows of every format become messages, which are shown with the first letters of their roles.
#[test]
fn rows_of_every_format_become_messages() {
    let call = json!({"name": "f", "arguments": {"x": 1}});
    for (row, expected) in [
        (
            json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "prompt": "p"}),
            "u:q a:r",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}, {"role": "assistant", "content": "r"}]}),
            "u:q! a:r",
        ),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "s"}),
            "s:s u:q a:r",
        ),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}, {"from": "function_call", "value": call.to_string()}, {"from": "observation", "value": "o"}, {"from": "assistant", "value": "r"}]}),
            "s:s u:q a:null t:o a:r",
        ),
        (json!({"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]}), "u:q a:r"),
        (json!({"instruction": "i", "input": "", "output": "o", "system": ""}), "u:i a:o"),
        (
            json!({"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["a", "b"]]}),
            "s:s u:a a:b u:i\nn a:o",
        ),
        (json!({"prompt": "p", "completion": " c"}), "u:p a: c"),
        (json!({"prompt": "p", "response": "c", "system": "s"}), "s:s u:p a:c"),
        (
            json!({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]}),
            "u:p a:c",
        ),
    ] {
        let found = conversation(row.clone()).messages;
        let shown =
            |m: &Json| format!("{}:{}", &m["role"].as_str().unwrap()[..1], m["content"].as_str().unwrap_or("null"));
        assert_eq!(found.iter().map(shown).collect::<Vec<_>>().join(" "), expected, "{row}");
    }
    let tools = json!([{"type": "function"}]);
    let with = conversation(json!({"messages": [{"role": "user", "content": "q", "name": "n"},
        {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"x\": \
                                                                                                                           1}"}}]}],
        "tools": tools.to_string()}));
    assert_eq!(with.tools, Some(tools));
    assert_eq!(with.messages[0]["name"], "n");
    assert_eq!(with.messages[1]["tool_calls"][0]["function"], call);
    let without = conversation(json!({"prompt": "p", "response": "r", "tools": []}));
    assert_eq!(without.tools, None);
}

#[test]
fn bad_rows_are_refused() {
    let user = json!({"role": "user", "content": "q"});
    let of = |message: Json| json!({"messages": [user, message]});
    let assistant = |content: Json| of(json!({"role": "assistant", "content": content}));
    for (row, said) in [
        (json!({}), "it has no keys, and a conversation is `messages`"),
        (json!({"mesages": []}), "it has the keys `mesages` (did you mean `messages`?), and a conversation is"),
        (json!({"messages": []}), "it has no messages"),
        (json!({"messages": "x"}), "`messages` is a text, and should be a list of messages"),
        (json!({"messages": ["x"]}), "message 1 is a text, and should be an object"),
        (json!({"messages": [user]}), "no message is the assistant's, so there is nothing to learn"),
        (
            of(json!({"role": "asistant", "content": "x"})),
            "message 2: unknown role `asistant` (did you mean `assistant`?); roles are system, developer, user, \
             assistant, tool",
        ),
        (of(json!({"role": "GPT", "content": "x"})), "message 2: unknown role `GPT` (did you mean `assistant`?)"),
        (of(json!({"content": "x"})), "message 2: it has no `role`"),
        (of(json!({"role": 1, "content": "x"})), "message 2: its `role` is 1, and should be a text"),
        (of(json!({"role": "assistant"})), "message 2: the assistant's message has no `content`"),
        (assistant(Json::Null), "message 2: the assistant's message has no `content`"),
        (assistant(" \n".into()), "message 2: the assistant's `content` is empty"),
        (assistant(3.into()), "message 2: its `content` is 3, and should be a text or a list of parts"),
        (
            assistant(json!([{"type": "image"}])),
            "message 2: a part of its content is of type `image`, and only text is read",
        ),
        (assistant(json!([{"type": "text"}])), "message 2: a part of its content is not"),
        (
            of(json!({"role": "assistant", "content": null, "tool_calls": []})),
            "message 2: the assistant's message has no `content`",
        ),
        (
            of(json!({"role": "assistant", "content": null, "tool_calls": "f()"})),
            "message 2: its `tool_calls` are a text, and should be a list",
        ),
        (
            of(json!({"role": "assistant", "content": null, "tool_calls": ["f()"]})),
            "message 2: its `tool_calls` are not objects",
        ),
        (
            of(json!({"role": "assistant", "content": "x", "weight": 2})),
            "message 2: its `weight` is 2, and should be 0 or 1",
        ),
        (
            json!({"conversations": [{"from": "humn", "value": "q"}]}),
            "message 1: `from` is `humn`, which is not a known speaker (did you mean `human`?)",
        ),
        (
            json!({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]}),
            "message 2: the `value` of `function_call` should be JSON",
        ),
        (json!({"conversations": [{"from": "human"}]}), "message 1: the user's message has no `content`"),
        (json!({"instruction": "i", "output": ""}), "`output` is empty"),
        (json!({"instruction": " ", "output": "o"}), "`instruction` is empty"),
        (json!({"instruction": "i", "output": "o", "history": ["x"]}), "`history` should be a list of pairs"),
        (json!({"prompt": "p", "completion": ""}), "`completion` is empty"),
        (
            json!({"messages": [user, {"role": "assistant", "content": "x"}], "tools": {}}),
            "`tools` is an object, and should be a list",
        ),
        (
            json!({"messages": [user, {"role": "assistant", "content": "x"}], "tools": "x"}),
            "`tools` is a text that is not a JSON list",
        ),
    ] {
        let found = Conversation::of(self::row(&row)).expect_err(&row.to_string());
        assert!(found.starts_with(said), "{row}: {found}");
    }
}
