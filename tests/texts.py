"""A small multilingual sample, written for Topkapi: what tokenizers, detokenisers and chat templates stumble over."""

SCRIPTS = (
    "The ferry left at dawn; nobody aboard had slept, and I'm told they'd sung ALL night. We've heard it's true.",
    "Çarşıdan aldım bir tane, eve geldim bin tane. İstanbul'da ığdır, şöför, ağaç.",
    "Größenwahn überm Fluß — „Straßenbahn“, naïveté, cœur, ñandú, Łódź, žluťoučký kůň.",
    "Η θάλασσα ήταν ήρεμη. Море было спокойно, и чайки молчали. Київ, ґанок.",
    "הים היה שקט \u202bוהשחפים שתקו\u202c.",
    "كان البحر هادئًا، والنوارس صامتة. العَرَبِيَّةُ ١٢٣",
    "समुद्र शांत था। क्षत्रिय, हिन्दी, १२३४५। தமிழ் மொழி. ภาษาไทยไม่มีช่องว่าง ლამაზი հայերեն አማርኛ",
    "海很平静，海鸥沉默。海は静かで、カモメは黙っていた。바다는 고요했다. 한글 ㄱㄴㄷ",
)
MARKS = (
    "e\u0301 and \u00e9 differ; a\u0308\u0323 stacks; Z\u0351\u036b\u0343a\u0321l\u0353g\u0347o; \u0301 alone",
    "\U0001f469\u200d\U0001f4bb \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
    "\U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1f9\U0001f1f7 \U0001f44b\U0001f3ff 1\ufe0f\u20e3 \u2764\ufe0f",
    "\U00020000\U0001d54f\U0001f0a1 \ue000\U000f0000\U0010fffd \ufdfd \u1112\u1161\u11ab",
)
CODE = (
    'def f(x: int = 0) -> str:\n    """Doc."""\n\tif x != 1_000:\r\n        return f"{x!r:>10}\\n"  # naïve\n\n\n',
    "for(;;){a[i]+=b->c*0xFF;} //?? <html>&amp;</html> `$HOME` ~/.x  C:\\new\\table",
)
DIGITS = ("3.14159 1,000,000 007 12345678901234567890 3rd x86_64 ½ ² Ⅷ ٣٤ 五 1 2  3   4\n5\t6 a1b22c333",)
SPACES = (
    " lead", "trail ", "  two  ", "\n\n\n", " \n \n ", "\t\t x", "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g",
    "a \u00a0 \u2003 b", "\r\n\r\n", "x" + " " * 50 + "y", " " * 50, "", " ", "\n", "end\n", "\ufeffbom", "z\u200bw",
)  # fmt: skip
CONTROL_CHARACTERS = ("\x00\x01\x04\x06\x07\x13\x14\x16\x1b[31m\x1d\x7f\x80\x9f", "a\x00b\x0bc\x0cd")
CONTROL_SPELLINGS = (
    "<|endoftext|>", "a<|im_start|>user\nb<|im_end|>", "</s><s>[INST]", "<|<|im_end|>|>", "<|im_end|", "|im_end|>",
    "<|endoftext|><|endoftext|>", "<unk><pad>[CLS]", " <|im_end|> ",
)  # fmt: skip

ALL = (*SCRIPTS, *MARKS, *CODE, *DIGITS, *SPACES, *CONTROL_CHARACTERS, *CONTROL_SPELLINGS)
JOINED = "\n".join(ALL)
