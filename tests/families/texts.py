"""Texts in several scripts, emoji, code and white space: for training the tiny vocabularies, and for comparing them."""

# ruff: noqa: RUF001, E501 strange characters are what this is about
from __future__ import annotations

TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? I'LL say; we've SEEN they'd rather not.",
    "Numbers: 3.14159, 1,000,000 and 2026-11-24; 7 + 35 = 42. Version v1.2.3-rc4, 50 % off, №12, Ⅷ, ½, ٣٤٥.",
    "camelCase, PascalCase, SCREAMING_SNAKE, kebab-case, HTTPServer2Client, iPhone15, naïveCafé, ÉCOLEprimaire",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; Straße, Übermut, fünf Äpfel.",
    "Dès Noël où un zéphyr haï me vêt de glaçons würmiens, l’été s’enfuit.",
    "Cafe\u0301 und Café, A\u030angstro\u0308m, n\u0303: composed and decomposed.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ЁЖИК идёт!",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Καλημέρα, τι κάνεις;",
    "نص حكيم له سر قاطع وذو شأن عظيم، مرحبا بالعالم.",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שלום עולם!",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश हुआ। नमस्ते दुनिया",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า สวัสดีชาวโลก",
    "今天天气很好，我们去公园散步吧。你好，世界！２０２６年",
    "いろはにほへと ちりぬるを。東京は夜の七時、カタカナとひらがな。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 안녕하세요",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ✈︎ 🤷🏻‍♂️ text🚀text 💯%",
    'def f(x: int) -> str:\n    """Doc."""\n    if x >= 10 and x != 0x1F:\n\t\treturn f\'{x:>8}\'\n    return None  # done\n',
    "for (int i = 0; i < n; ++i) { a[i] += b[i]*c; } // sum\n#include <stdio.h>\r\nint main(void){return 0;}\r\n",
    'SELECT a.id, COUNT(*) FROM t1 AS a WHERE a.x LIKE \'%y_z%\' GROUP BY 1;\n\n\n{"key": [1, 2.5e-3, null], "ok": true}',
    '<div class="x"><p>a &amp; b</p>\n  <br/>\n</div> https://example.org/a/b?c=d&e=%20f#g user@example.org',
    "  leading, trailing   ",
    "a b  c   d    e     f      g\tTab\t\ttwo\n\nlines\n\n\nmore \n \n  mixed \t \n end",
    " ",
    "\n",
    "x",
    "",
    "no\u00a0break, thin\u2009space, zero\u200bwidth, ideographic\u3000space, line\u2028separator, soft\u00adhyphen",
    "''' \"\"\" ``` ~~~ *** ### --- ... !!! ??? ((())) [[[]]] {{{}}} <<<>>> $$$ €£¥₹ ±×÷≤≥≠∞∑∏√∫ ←↑→↓",
    "don't DON'T Don't we're WE'RE i'm I'M it's IT'S he'll HE'LL they've 'tis 'S 'sup o'clock rock'n'roll",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa 0000000000000000 .................. ------------------",
)
"""Of our own making, or pangrams in common use."""
