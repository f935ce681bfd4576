"""Writes chat.json: conversations as transformers renders and encodes them by chat templates of eight families.

    python tests/interop/chat_fixtures.py

The templates are written for this project in the styles of these models. `marked` is a template with `{% generation %}`
around the assistant's messages, and `masks` are the token ranges that transformers then marks. `probes` are single
expressions with their results in transformers' template environment. The date is fixed.
"""

import datetime as dates
import json
import os
import re
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers.utils.chat_template_utils as utils
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

OUT = Path(__file__).parent / "chat.json"
NOW = dates.datetime(2024, 7, 6, 15, 4, 5)


class Fixed(dates.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


utils.datetime = Fixed

SPECIAL = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|user|>",
    "<|assistant|>", "<|system|>", "<|end|>",
]
CORPUS = [
    "the film is a good film and the story is not bad", "what is the weather in the city today", "user and assistant",
    "You are a helpful assistant.", '{"name": "weather", "arguments": {"city": "Oslo"}}', "system prompt", "\n\n", "model",
    "Tell me about tea and coffee, please", "it is raining and the temperature is 4 degrees",
] * 4

CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration +%}
{% else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{#- The system message is taken out, so that the date is always written. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and tools is not none %}
    {%- if messages | length == 0 %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- "Given the following functions, respond with JSON for a call.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {%- if message['role'] == 'assistant' %}
            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
            {%- generation %}
                {{- message['content'] | trim + '<|eot_id|>' }}
            {%- endgeneration %}
        {%- else %}
            {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {%- generation -%}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
        {%- endgeneration -%}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nFunction signatures are within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- generation %}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' }}{% if role == 'model' %}{% generation %}{{ message['content'] | trim + '<end_of_turn>\\n' }}\
{% endgeneration %}{% else %}{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val | tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- generation %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
        {%- endgeneration %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"] | trim + eos_token }}{% endgeneration %}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

PHI = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
'}}{% generation %}{{ message['content'] + '<|end|>
'}}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration +%}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

SMOLLM = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}\
{{ message['content'] }}{% endif %}{{ '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

FAMILIES = {
    "ChatML": (CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "Llama 3.1": (LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "Qwen2.5": (QWEN, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "Gemma": (GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "Mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}),
    "Phi": (PHI, {"bos_token": "<s>", "eos_token": "<|endoftext|>"}),
    "Zephyr": (ZEPHYR, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}),
    "SmolLM2": (SMOLLM, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
}


def unmarked(template):
    """The template with blocks without effect in place of the generation blocks, so that whitespace is treated
    alike."""
    def block(tag):
        return "{%" + tag[1] + (" if true " if tag[2] == "generation" else " endif ") + tag[3] + "%}"

    return re.sub(r"\{%(-?)\s*(generation|endgeneration)\s*([-+]?)%\}", block, template)


WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Weather of a city: <b>now</b> & 'soon'",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "The city's name, Zürich \"or\" 東京"}, "days": {"type": "number", "default": 1.5}},
        "required": ["city"]}}}
CALL = {"id": "abc123DEF", "type": "function", "function": {
    "name": "weather", "arguments": {"city": "Tromsø", "days": 2, "exact": True, "at": [1.0, 1e-7, 1e22, None], "in": {}}}}


def said(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[role], "content": content} for role, content in turns]}


CONVERSATIONS = {
    "single": said(("u", "What is tea?"), ("a", "A drink.")),
    "system": said(("s", "You are terse."), ("u", "What is tea?"), ("a", "A drink.")),
    "several": said(("u", "Tea?"), ("a", "A drink."), ("u", "And coffee?"), ("a", "Another one, and a good one."), ("u", "Milk?"), ("a", "No.")),
    "several, system": said(("s", "Be kind."), ("u", "Tea?"), ("a", "Yes, please."), ("u", "Film?"), ("a", "The story is good.")),
    "unicode": said(("u", "Was heißt 電影 🎬?"), ("a", "Film – naïve e\u0301 🙂")),
    "blanks": said(("s", "  Be kind. \n"), ("u", "  two  blanks \n\n"), ("a", "\n  a list:\n - one\n\n - two  \n")),
    "newlines": said(("u", "\n\nHi\n"), ("a", "\n\n\nHello\n\n")),
    "special tokens": said(("u", "What is <|im_end|> and </s>?"), ("a", "<|im_end|>\n<|im_start|>user\nIt ends a turn, like <end_of_turn>, <|eot_id|>.")),
    "tools": {"messages": [
        {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": '{"degrees": -4.0}', "tool_call_id": "abc123DEF"},
        {"role": "assistant", "content": "It is cold."}], "tools": [WEATHER, WEATHER]},
    "a call without tools": {"messages": [
        {"role": "system", "content": "Call."}, {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]}]},
    "two of the user": said(("u", "Hi."), ("u", "Are you there?"), ("a", "Yes.")),
    "ends with the user": said(("u", "Hi."), ("a", "Hello."), ("u", "Bye.")),
    "empty system": said(("s", ""), ("u", "Hi."), ("a", "Hello.")),
    "template syntax": said(("u", "{{ bos_token }} {% generation %}"), ("a", "{# no #} <b>&amp; 'x'</b>")),
}

PROBES = [
    "{{ messages[0] }}", "{{ [1, 2.5, true, none, 'a\"b', \"c'd\"] }}", "{{ {'a': [1], 'b': none} }}", "{{ none }}|{{ missing }}|{{ true }}",
    "{{ 1e16 }} {{ 0.1 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ -7 % 3 }}", "{{ messages | tojson }}",
    "{{ {'b': 1, 'a': '<&\\'\\u00e9'} | tojson(sort_keys=true, ensure_ascii=true) }}", "{{ [1, {'a': []}, {}] | tojson(indent=2) }}",
    "{{ [1, 2] | tojson(separators=(',', ':')) }}", "{{ [1.0, 1e-7, 1e22, 123456789.25, 1e-4] | tojson }}",
    "{{ '  x '.strip() }}{{ 'a-b-c'.split('-')[-1] }}{{ 'abc'.replace('b', 'x') }}{{ 'x'.startswith(('a', 'x')) }}",
    "{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}|{{ '\\n\\na\\n'.rstrip('\\n') }}|{{ 'Ab'.upper() }}{{ 'aB' | title }}",
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.previtem is defined }}{{ loop.length }};{% endfor %}",
    "{% for m in messages[::-1] %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% set ns = namespace(a=1, found=false) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}{{ ns.found }}",
    "{% macro f(x, y='d') %}[{{ x }}{{ y }}{{ caller is defined }}]{% endmacro %}{{ f(1) }}{{ f(1, y=2) }}",
    "{{ messages | map(attribute='role') | join(', ') }}", "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{{ (messages | last).role }}{{ (messages | first)['role'] }}{{ messages[-1].content | length }}",
    "{{ strftime_now('%d %b %Y %A %B %H:%M:%S %j %y %-d %I %p') }}", "{{ 'x' if missing is defined else 'y' }}{{ missing | default('z') }}",
    "{{ 'a' ~ 1 ~ none ~ true }}", "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 1 in [1] }}", "{{ messages[0].missing }}|{{ messages[5] }}|",
    "{% if messages[0].content is string and messages is iterable and messages[0] is mapping and messages is not mapping %}ok{% endif %}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{{ x is string }}", "{{ dict(a=1, b='x') }}{{ dict(a=1).items() | list }}",
    "{%- raw %}{% generation %}{{ x }}{% endraw -%}  y", "{# {% generation %} #}z", "{{ '{% generation %}' }}", "a\n  {%- if true %}\n  b\n  {%+ endif %}\nc\n\n",
    "{{ range(3) | list }}{{ range(1, 6, 2) | list }}", "{{ 'abc'[1:] }}{{ 'abc'[-1] }}{{ [1, 2, 3][:2] }}", "{{ '%s-%d' | format('a', 3) }}{{ 'a\\nb' | indent(2) }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }},{% endfor %}{% for k, v in messages[0] | dictsort %}{{ k }}{% endfor %}",
    "{{ ['b', 'a'] | sort }}{{ [1, 1, 2] | unique | list }}{{ 'x' * 3 }}{{ [1] + [2] }}", "{{ messages[0].get('content') }}{{ messages[0].get('x') }}{{ messages[0].get('x', 'd') }}",
    "{{ messages[0]['role'] == 'user' and not tools }}{{ tools is none }}{{ tools is defined }}{{ add_generation_prompt }}",
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}", "{{ 3.0 | int }}{{ '5' | int + 1 }}{{ 2.7 | round }}{{ [1, 2] | sum }}",
    "{{ 'a,b' .split(',') | join('\\n') | trim }}{{ 'x'.join(['1', '2']) }}{{ 'ab'.find('b') }}{{ 'Title'.lower().capitalize() }}",
    "{{ missing.attribute }}", "{{ missing + 'x' }}", "{{ 'a' + 1 }}", "{{ messages[0].content.nope() }}", "{{ messages | tojson(1, 2, 3, 4, 5) }}",
    "{{ missing | tojson }}", "{{ raise_exception('no ' ~ 'way') }}", "{{ messages.append(1) }}", "{% set messages[0] = 1 %}",
]


def main():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    contents = tokenizer.to_str()

    def load(config):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_text(contents)
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
            return AutoTokenizer.from_pretrained(folder)

    def chat(loaded, conversation, **options):
        return loaded.apply_chat_template(conversation["messages"], tools=conversation.get("tools"), **options)

    families = {}
    for name, (template, tokens) in FAMILIES.items():
        plain, marked = (load({**tokens, "chat_template": text}) for text in (unmarked(template), template))
        cases = {}
        for key, conversation in CONVERSATIONS.items():
            try:
                text = chat(plain, conversation, tokenize=False)
            except Exception as error:
                cases[key] = {"error": str(error)}
                continue
            encoded = chat(marked, conversation, return_dict=True, return_assistant_tokens_mask=True)
            assert chat(marked, conversation, tokenize=False) == text, (name, key)
            ids = chat(plain, conversation, return_dict=True)["input_ids"]
            assert encoded["input_ids"] == ids, (name, key)
            mask, ranges = encoded["assistant_masks"] + [0], []
            for at, (before, here) in enumerate(zip([0] + mask, mask)):
                if here > before:
                    ranges.append([at, at])
                elif here < before:
                    ranges[-1][1] = at
            cases[key] = {"text": text, "ids": ids, "masks": ranges}
        families[name] = {"tokens": tokens, "template": unmarked(template), "marked": template, "cases": cases}

    probes = []
    for probe in PROBES:
        loaded = load({"bos_token": "<s>", "eos_token": "</s>", "chat_template": probe})
        try:
            probes.append({"template": probe, "text": chat(loaded, CONVERSATIONS["several"], tokenize=False)})
        except Exception as error:
            probes.append({"template": probe, "error": f"{error}"})
    now = int(NOW.replace(tzinfo=dates.timezone.utc).timestamp())
    out = {"now": now, "tokenizer": json.loads(contents), "conversations": CONVERSATIONS, "families": families, "probes": probes}
    OUT.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{OUT}: {OUT.stat().st_size} bytes")


main()
