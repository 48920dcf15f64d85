"""Chat templates in the manners of models in use, and some that nothing but a program can say."""

from __future__ import annotations

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "", "unk_token": ""}
LOOP = "{% for m in messages %}"
CHATML = LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
TURNS = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
)
REDUCIBLE = {
    "chatml": CHATML + ASK,
    "chatml with a default system turn": DEFAULT + CHATML + ASK,
    "headers": "{{ bos_token }}"
    + LOOP
    + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    + "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "closing": LOOP
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "no system turn": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    + TURNS
    + "{{ '<turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content | trim + '</turn>\n' }}"
    + "{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "system inside the first user turn": "{% set ns = namespace(s='') %}"
    + LOOP
    + "{% if m.role == 'system' %}{% set ns.s = '<<SYS>>' + m.content + '<</SYS>>\n\n' %}"
    + "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.s + m.content + ' [/INST]' }}{% set ns.s = '' %}"
    + "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    "marked for training": LOOP
    + "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %};"
    + "{% else %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
}
IRREDUCIBLE = {
    "system in the last user turn": (
        LOOP
        + "{% if m.role == 'user' %}[I]{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n"
        + "{% endif %}{{ m.content }}[/I]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "left out, repeated or moved",
    ),
    "thoughts are cut": (
        LOOP + "{{ '<' + m.role + '>' + m.content.split('</think>')[-1] + '\n' }}{% endfor %}",
        "more than whose turn it is",
    ),
    "the date": ("{{ strftime_now('%d %b %Y') }}\n" + CHATML + ASK, "depends on the date"),
    "turns are counted": (LOOP + "{{ loop.index }}. {{ m.content }}\n{% endfor %}", "depends on where"),
    "one side is trimmed": (
        LOOP + "{{ '<' + m.role + '>' + m.content.lstrip() }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
        "more than whose turn it is",
    ),
    "an empty text is left out": (
        LOOP + "<{{ m.role }}>{% if m.content %}[{{ m.content }}]{% else %}-{% endif %}\n{% endfor %}",
        "more than whose turn it is",
    ),
    "never": ("{{ raise_exception('tools only') }}", "refuses an ordinary conversation: tools only"),
    "broken": ("{% if %}", "refuses an ordinary conversation: Expected an expression"),
    "an attribute of texts": (LOOP + "{{ m.content.nothing() }}{% endfor %}", "refuses an ordinary conversation"),
}
