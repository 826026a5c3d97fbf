"""A short text on which two byte-level encodings that differ anywhere in their split are likely to differ."""

SAMPLE = (
    "Hello there, I'M sure you're 12,345.67 steps 3rd½ from it's\u2019ll 'tis don't  \n\n\n  two   spaces \r\n\ttab\t\tend \n"
    "def f(x):\n        return x**2  # caf\u00e9 cafe\u0301 na\u00efve \u00dcber Stra\u00dfe \u0130stanbul \u017f's\n"
    "\u0397 \u03b3\u03bb\u03ce\u03c3\u03c3\u03b1 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u0651\u0629 \u0967\u0968\u0969 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22"
    " \u4e2d\u6587\uff0c\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002 \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \u2764\ufe0f\U0001f1eb\U0001f1f7 \U00020000\U0001d518"
    "\u00a0nbsp\u2003em\u3000wide\u2028line\u2029para\u0085nel\u200bzero\u00adsoft\ufeffbom\x00\x07\x1b[0m\x7f\u0300 \u0300"
    " 1 2  3\t4\n5 \u0661\u0662 \u2167 \u00b2 x1y22z333 ### --- ... \"q\" (a)[b]{c} $_ @#%&*!? <|endoftext|><|im_start|></s>   "
)
