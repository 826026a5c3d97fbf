"""The word lists that exercises are made of. All of them were written for this purpose."""

from __future__ import annotations


def listed(words: str) -> list[str]:
    """Words with white space between them, as a list."""
    return words.split()


def paired(pairs: str) -> dict[str, str]:
    """`first:second` pairs with white space between them."""
    return dict(pair.split(":") for pair in listed(pairs))


CATEGORIES: dict[str, list[str]] = {
    name: listed(items)
    for name, items in {
        "animal": "dog cat horse cow pig sheep goat rabbit mouse lion tiger bear wolf fox deer elephant monkey camel "
        "donkey zebra giraffe squirrel",
        "bird": "owl eagle crow sparrow robin swan parrot pigeon goose hen duck penguin hawk stork gull",
        "insect": "ant bee fly beetle moth wasp butterfly mosquito cricket ladybird",
        "fruit": "apple pear banana grape cherry peach plum lemon mango melon fig strawberry",
        "vegetable": "carrot potato onion cabbage bean pea leek turnip spinach radish beetroot celery",
        "colour": "red blue green yellow black white brown pink purple orange grey",
        "tool": "hammer saw spade axe drill rake chisel wrench screwdriver file",
        "garment": "shirt coat hat sock shoe dress skirt scarf glove jacket sweater belt",
        "vehicle": "car bus train lorry bicycle boat ship plane tram van motorcycle wagon",
        "instrument": "piano violin guitar flute drum trumpet harp cello organ clarinet",
        "drink": "water milk tea coffee juice lemonade cocoa cider",
        "job": "doctor teacher farmer baker nurse sailor tailor painter lawyer pilot soldier butcher judge "
        "cook gardener",
        "sport": "football tennis swimming rowing hockey golf boxing cricket cycling skiing",
        "country": "France Spain Italy Germany China India Japan Egypt Brazil Greece Norway Turkey Mexico "
        "Canada Kenya Peru",
        "shape": "circle square triangle rectangle oval star cube",
        "metal": "iron gold silver copper tin lead zinc steel",
        "tree": "oak pine birch willow maple elm ash cedar palm",
        "flower": "rose tulip daisy lily violet poppy daffodil orchid",
        "piece of furniture": "chair table bed sofa desk shelf cupboard stool bench wardrobe",
        "part of the body": "arm leg head hand foot nose ear eye knee mouth finger shoulder neck back",
        "season": "spring summer autumn winter",
        "room": "kitchen bedroom bathroom cellar attic hall library",
    }.items()
}
"""Things by what they are; the name is one of them in the singular."""

# What belongs to two of them says nothing about either.
_SEEN = [item for items in CATEGORIES.values() for item in items]
CLEAR = {name: [item for item in items if _SEEN.count(item) == 1] for name, items in CATEGORIES.items()}
"""`CATEGORIES` without what belongs to two of them."""

PEOPLE = listed("king queen friend girl boy brother sister uncle cousin baby neighbour")
_PLACES = listed(
    "garden street river bridge hill field island lake forest road market school shop church village town city"
)
_OBJECTS = listed(
    "book chair lamp clock key box bag cup plate spoon bottle letter stamp picture flag ball kite doll coin ring rope "
    "ladder basket bucket mirror pillow blanket candle brush needle button map pencil ticket bell feather stick stone "
    "boat wheel game leaf table"
)
_OTHERS = listed(
    "door window house pocket wall roof tower castle farm star cloud storm song story party page engine nest tail wing"
)
THINGS = [item for name in ("fruit", "vegetable", "tool", "garment", "instrument") for item in CLEAR[name]] + _OBJECTS
"""What one can have, buy and lose."""
_BEINGS = [item for name in ("animal", "bird", "insect", "vehicle", "job") for item in CLEAR[name]]
NOUNS = [*THINGS, *_BEINGS, *PEOPLE, *_PLACES, *_OTHERS]
"""Things and beings that can be counted."""

IRREGULAR_PLURALS = paired(
    "child:children man:men woman:women mouse:mice goose:geese foot:feet tooth:teeth sheep:sheep deer:deer "
    "leaf:leaves shelf:shelves knife:knives wife:wives wolf:wolves life:lives half:halves loaf:loaves "
    "thief:thieves calf:calves person:people ox:oxen fish:fish potato:potatoes tomato:tomatoes hero:heroes "
    "scarf:scarves"
)

REGULAR_VERBS = listed(
    "walk jump play help look open close wash cook paint clean talk call ask answer laugh smile dance climb "
    "push pull kick pick pack cross work wait watch want need like love hate use move live arrive visit "
    "follow carry cry try study hurry stay enjoy listen learn turn start finish end plant water fill mix "
    "cover touch reach point count collect invite thank bake fix save share march rest shout whisper "
    "knock"
)

IRREGULAR_VERBS = {
    base: (past, participle)
    for base, past, participle in (
        each.split(":")
        for each in listed(
            "go:went:gone see:saw:seen eat:ate:eaten take:took:taken give:gave:given come:came:come make:made:made "
            "find:found:found say:said:said tell:told:told buy:bought:bought bring:brought:brought "
            "think:thought:thought catch:caught:caught teach:taught:taught write:wrote:written read:read:read "
            "ride:rode:ridden drive:drove:driven break:broke:broken speak:spoke:spoken steal:stole:stolen "
            "hide:hid:hidden sing:sang:sung drink:drank:drunk swim:swam:swum begin:began:begun ring:rang:rung "
            "run:ran:run sit:sat:sat stand:stood:stood hold:held:held keep:kept:kept sleep:slept:slept feel:felt:felt "
            "leave:left:left meet:met:met lose:lost:lost build:built:built send:sent:sent spend:spent:spent "
            "hear:heard:heard sell:sold:sold throw:threw:thrown know:knew:known grow:grew:grown fly:flew:flown "
            "draw:drew:drawn wear:wore:worn fall:fell:fallen get:got:got win:won:won cut:cut:cut put:put:put"
        )
    )
}
"""Base form to past tense and past participle."""

ACTIONS = listed(
    "chased watched helped followed called carried pushed pulled kicked washed painted cleaned touched visited "
    "invited thanked saw found caught heard met held drew"
)
"""Past tenses of what one can do to another."""
ACTION_PARTICIPLES = {"saw": "seen", "drew": "drawn"}
"""The participles of those in which they differ."""

OPPOSITES = [
    (first, second)
    for first, second in (
        pair.split(":")
        for pair in listed(
            "hot:cold big:small tall:short fast:slow old:young happy:sad light:dark hard:soft full:empty open:closed "
            "early:late clean:dirty dry:wet strong:weak rich:poor loud:quiet near:far high:low wide:narrow thick:thin "
            "heavy:light good:bad right:wrong true:false up:down left:right in:out on:off day:night black:white "
            "first:last always:never begin:end give:take buy:sell push:pull win:lose love:hate laugh:cry come:go "
            "remember:forget above:below inside:outside before:after front:back top:bottom north:south east:west "
            "brave:afraid sharp:blunt deep:shallow smooth:rough sweet:sour easy:difficult cheap:expensive alive:dead "
            "awake:asleep polite:rude safe:dangerous simple:complicated ugly:beautiful sick:healthy friend:enemy "
            "question:answer arrive:leave more:less many:few summer:winter king:queen"
        )
    )
]
"""Pairs that hold both ways."""

SYNONYMS = paired(
    "big:large small:little happy:glad sad:unhappy quick:fast begin:start end:finish shut:close angry:cross "
    "smart:clever rich:wealthy afraid:scared sick:ill easy:simple hard:difficult pretty:beautiful "
    "silent:quiet correct:right mistake:error gift:present child:kid road:street stone:rock shop:store "
    "speak:talk choose:pick tired:weary brave:bold strange:odd huge:enormous tiny:minute buy:purchase "
    "help:assist"
)

ADJECTIVES = {
    base: tuple(rest.split("/"))
    for base, rest in (
        each.split(":")
        for each in listed(
            "big:bigger/biggest small:smaller/smallest tall:taller/tallest short:shorter/shortest fast:faster/fastest "
            "slow:slower/slowest old:older/oldest young:younger/youngest happy:happier/happiest sad:sadder/saddest "
            "hot:hotter/hottest cold:colder/coldest hard:harder/hardest soft:softer/softest clean:cleaner/cleanest "
            "strong:stronger/strongest weak:weaker/weakest rich:richer/richest poor:poorer/poorest "
            "loud:louder/loudest high:higher/highest low:lower/lowest wide:wider/widest thick:thicker/thickest "
            "thin:thinner/thinnest heavy:heavier/heaviest light:lighter/lightest dark:darker/darkest "
            "early:earlier/earliest late:later/latest easy:easier/easiest busy:busier/busiest funny:funnier/funniest "
            "pretty:prettier/prettiest sweet:sweeter/sweetest deep:deeper/deepest cheap:cheaper/cheapest "
            "kind:kinder/kindest long:longer/longest good:better/best bad:worse/worst brave:braver/bravest "
            "large:larger/largest nice:nicer/nicest safe:safer/safest new:newer/newest warm:warmer/warmest "
            "cool:cooler/coolest bright:brighter/brightest"
        )
    )
}
"""Adjective to comparative and superlative."""

WOMEN = listed(
    "Anna Emma Clara Lucy Mary Sarah Alice Ella Grace Nina Julia Maya Ruth Laura Helen Jane Rosa Kate Amy Zoe "
    "Lena Eva Nora Sofia Olga Ivy Leila Hannah Diana Paula Vera Tara Megan Carol Judith Wendy Irene Elif "
    "Aisha Mei"
)
MEN = listed(
    "Tom Ben Max Sam Peter Paul John David James Mark Luke Adam Noah Leo Jack Henry Oscar Felix Hugo Ali Omar "
    "Victor Simon Daniel Robert George Martin Oliver Frank Arthur Walter Edward Karl Ivan Diego Kenji Deniz "
    "Raj Philip Bruno"
)
NAMES = WOMEN + MEN

CITIES = listed(
    "London Paris Rome Berlin Madrid Athens Oslo Vienna Cairo Tokyo Boston Chicago Lisbon Dublin Prague "
    "Warsaw Delhi Istanbul Ankara Moscow Sydney Toronto Nairobi Lima Geneva Venice Bergen Kyoto Seville "
    "Naples"
)

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Greece": "Athens", "Norway": "Oslo", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin",
    "England": "London", "Russia": "Moscow", "Turkey": "Ankara", "Poland": "Warsaw", "Kenya": "Nairobi", "Peru": "Lima",
    "China": "Beijing", "India": "New Delhi", "Canada": "Ottawa", "Sweden": "Stockholm", "Hungary": "Budapest",
}  # fmt: skip

YOUNG = paired(
    "dog:puppy cat:kitten cow:calf horse:foal sheep:lamb goat:kid hen:chick duck:duckling pig:piglet bear:cub "
    "lion:cub goose:gosling deer:fawn frog:tadpole swan:cygnet"
)

SOUNDS = paired(
    "dog:barks cat:meows cow:moos sheep:bleats lion:roars duck:quacks bee:buzzes snake:hisses wolf:howls "
    "mouse:squeaks pig:grunts frog:croaks owl:hoots crow:caws"
)

COLOURS_OF = paired(
    "snow:white grass:green blood:red coal:black milk:white night:black lemon:yellow tomato:red cherry:red "
    "chocolate:brown salt:white banana:yellow leaf:green crow:black carrot:orange"
)

DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
ORDINALS = listed("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
_SMALL = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")


def number_word(number: int) -> str:
    """0 to 99 in words."""
    if number < 20:
        return _SMALL[number]
    tens = _TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{_SMALL[number % 10]}"


def plural(noun: str) -> str:
    """The plural of a noun."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def past(verb: str) -> str:
    """The past tense of a verb in its base form."""
    if verb in IRREGULAR_VERBS:
        return IRREGULAR_VERBS[verb][0]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


def third_person(verb: str) -> str:
    """What she does: `walks`, `goes`, `carries`."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "ch", "sh", "o")) else "s")


def a(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0].lower() in 'aeio' or noun.startswith(('umb', 'unc')) else 'a'} {noun}"
