"""A short text on which two byte-level encodings that differ anywhere in their split are likely to differ."""

SAMPLE = (
    "Hello there, I'M sure you're 12,345.67 steps 3rd½ from it's\u2019ll 'tis don't  \n\n\n  two   spaces"
    " \r\n\ttab\t\tend \ndef f(x):\n        return x**2  # café cafe\u0301 naïve Über Straße İstanbul ſ's"
    "\nΗ γλώσσα русский \u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650"
    "\u064a\u0651\u0629 १२३ ह\u093fन\u094dद\u0940 ภาษาไทย 中文，日本語のテキスト。 한국어 한 \U0001f469\u200d\U0001f469"
    "\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \u2764\ufe0f\U0001f1eb\U0001f1f7 𠀀𝔘\u00a0nbsp"
    "\u2003em\u3000wide\u2028line\u2029para\u0085nel\u200bzero\u00adsoft\ufeffbom\u0000\u0007\u001b[0m"
    '\u007f\u0300 \u0300 1 2  3\t4\n5 \u0661\u0662 Ⅷ ² x1y22z333 ### --- ... "q" (a)[b]{c} $_ @#%&*!? <'
    "|endoftext|><|im_start|></s>   "
)

WORDS = (
    "The first of them said that it was so, and it's what they'd do. He has 12 apples, 3.5 kilos (or so) at 9 o'clock; "
    "New York is far away. \u201cIs it?\u201d she asked... Caf\u00e9 au lait, na\u00efve words   and a tab\t here.\n"
    "    def indented(a, b): return a in b or not b\nIn 1999 a b c d E F G HELLO WORLD iPhone x86 don't can't we'll."
)
"""The same for where a text may be cut: words, with what may stand beside them."""
