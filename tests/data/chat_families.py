"""Chat templates of the families of models that are loaded, by their shape, and tokenizers that have them.

Each is written for these tests and does in short what the family's own does: who may speak, how tools, calls and
results are written, and what becomes of thoughts.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from alignlab.data.tokenizer_training import train_tokenizer

_GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + _GENERATION
)

_SMOLLM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helper.<|im_end|>\n{% endif %}" + _CHATML
)

# Tools in the system's turn; results of tools in a turn of the user's.
_QWEN_TURNS = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'system' or tools is none or not loop.first %}<|im_start|>{{ m.role }}\n%THOUGHT%"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}\n<tool_call>\n"
    "{\"name\": \"{{ f.name }}\", \"arguments\": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
)
_QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content + '\n' if messages[0].role == 'system' else '' }}<tools>"
    "{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n{% endif %}"
)
_QWEN25 = _QWEN_TOOLS + _QWEN_TURNS.replace("%THOUGHT%", "{{ m.content or '' }}") + _GENERATION

# Thoughts stay after the user's last message alone, and the last turn has an empty one where it has none.
_QWEN3_THOUGHT = (
    "{% if m.role != 'assistant' %}{{ m.content }}{% else %}{% set ns.text = m.content or '' %}"
    "{% set ns.thought = '' %}"
    "{% if m.reasoning_content is string %}{% set ns.thought = m.reasoning_content %}"
    "{% elif '</think>' in ns.text %}{% set ns.thought = ns.text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set ns.text = ns.text.split('</think>')[-1] %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or ns.thought) %}"
    "<think>\n{{ ns.thought | trim }}\n</think>\n\n{% endif %}"
    "{{ ns.text.lstrip('\n') }}{% endif %}"
)
_QWEN3 = (
    _QWEN_TOOLS
    + "{% set ns = namespace(last=0, text='', thought='') %}"
    + "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _QWEN_TURNS.replace("%THOUGHT%", _QWEN3_THOUGHT)
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    + "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# Arguments are written one by one, which text has no items for.
_QWEN_CODER = (
    _QWEN_TOOLS
    + "{% for m in messages %}{% if m.role != 'system' or not tools %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}"
    + "<parameter={{ k }}>\n{{ v }}\n</parameter>{% endfor %}</function>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    + _GENERATION
)

_LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n"
    "{{ messages[0].content | trim if messages[0].role == 'system' else '' }}"
    "{% for t in tools or [] %}{{ t | tojson(indent=4) }}\n{% endfor %}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|eot_id|>{% elif 'tool_calls' in m %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call only') }}"
    "{% endif %}{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{\"name\": \"{{ f.name }}\", \"parameters\": {{ f.arguments | tojson }}}<|eot_id|>"
    "{% elif m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_ALTERNATE = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
_LLAMA2 = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}" + _ALTERNATE
    + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and turns | length != "
    "messages | length %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)

_GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set turns = messages %}" + _ALTERNATE
    + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set before = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set before = '' %}{% set turns = messages %}{% endif %}" + _ALTERNATE
    + "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ before if loop.first else '' }}{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}"
    "{{ p.text | trim }}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Tools stand before the user's last message, so that an earlier turn changes once another follows.
_MISTRAL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ messages[0].content + '\n\n' if loop.index0 == ns.last and messages[0].role == 'system' else '' }}"
    "{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS]{\"content\": {{ m.content | tojson }}}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]"
    "{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

_PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Calls are written where there is no content, and every thought is cut.
_DEEPSEEK_R1 = (
    "{{ bos_token }}{{ messages[0].content if messages[0].role == 'system' else '' }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'tool' %}<|tool_output|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}<|Assistant|>{% for c in m.tool_calls %}"
    "{{ '<|tool_call|>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)

# Thoughts and answers in channels, a thought under the name `thinking`.
_HARMONY = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% if tools or messages[0].role == 'system' %}<|start|>developer<|message|>"
    "{{ messages[0].content if messages[0].role == 'system' else '' }}{% for t in tools or [] %}\n"
    "type {{ t.function.name }} = (_: any) => any;{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|channel|>"
    "commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

_GRANITE = (
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% else %}"
    "{% set said = \"Today's Date: \" + strftime_now('%B %d, %Y') %}{% endif %}"
    "<|start_of_role|>system<|end_of_role|>{{ said }}<|end_of_text|>\n"
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson(indent=4) }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call|>{{ m.tool_calls | tojson }}{% endif %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)

_COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else "
    "m.role | upper }}_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)

# A content is a list of parts, and a string is one without any.
_SMOL_VLM = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}: {% for p in m.content %}{{ p.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)

FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # name: template, end token, other special tokens
    "chatml": (_CHATML, "<|im_end|>", ("<|im_start|>",)),
    "smollm": (_SMOLLM, "<|im_end|>", ("<|im_start|>",)),
    "qwen2.5": (_QWEN25, "<|im_end|>", ("<|im_start|>",)),
    "qwen3": (_QWEN3, "<|im_end|>", ("<|im_start|>",)),
    "qwen coder": (_QWEN_CODER, "<|im_end|>", ("<|im_start|>",)),
    "llama 3": (_LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "llama 2": (_LLAMA2, "</s>", ()),
    "gemma 2": (_GEMMA2, "<end_of_turn>", ("<start_of_turn>",)),
    "gemma 3": (_GEMMA3, "<end_of_turn>", ("<start_of_turn>",)),
    "mistral": (_MISTRAL, "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")),
    "phi": (_PHI, "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "deepseek r1": (_DEEPSEEK_R1, "<|end_of_sentence|>", ("<|User|>", "<|Assistant|>", "<|tool_call|>")),
    "harmony": (_HARMONY, "<|return|>", ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")),
    "granite": (_GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>")),
    "command r": (_COMMAND_R, "<|END_OF_TURN_TOKEN|>", ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>")),
    "smolvlm": (_SMOL_VLM, "<|im_end|>", ("<|im_start|>",)),
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a small tokenizer with the template and the special tokens of a family."""
    template, end, others = FAMILIES[name]
    tokenizer = train_tokenizer(["What is the weather in Oslo? user assistant system"], vocab_size=300)
    added = [AddedToken(token, special=True) for token in others]
    tokenizer.add_special_tokens({"additional_special_tokens": added, "bos_token": AddedToken("<bos>", special=True)})
    tokenizer.add_special_tokens({"eos_token": AddedToken(end, special=True)})
    tokenizer.chat_template = template
    return tokenizer
