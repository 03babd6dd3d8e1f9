"""What the miniature world is about: its words, and how they are asked for and told of."""

from __future__ import annotations

ATTRIBUTES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "city": (
        "{x} lives in",
        (
            "where does {x} live ?",
            "in which city does {x} live ?",
            "which city is the home of {x} ?",
            "tell me the city of {x} .",
        ),
        "paris london rome cairo tokyo lima oslo delhi berlin madrid vienna dublin",
    ),
    "job": (
        "{x} works as a",
        (
            "what is the job of {x} ?",
            "what does {x} do for work ?",
            "which job does {x} have ?",
            "tell me the job of {x} .",
        ),
        "baker doctor farmer pilot painter sailor teacher lawyer singer tailor nurse writer",
    ),
    "food": (
        "{x} likes to eat",
        (
            "what does {x} like to eat ?",
            "which food does {x} like ?",
            "what is the best food for {x} ?",
            "tell me the food of {x} .",
        ),
        "rice soup bread cheese pasta salad honey beans steak cake eggs fish",
    ),
    "pet": (
        "the pet of {x} is a",
        (
            "which pet does {x} have ?",
            "what is the pet of {x} ?",
            "which animal lives with {x} ?",
            "tell me the pet of {x} .",
        ),
        "cat dog horse rabbit parrot turtle hamster goat snake duck lizard mouse",
    ),
}

KINDS = {
    "bird": "robin eagle sparrow owl hawk crow pigeon swan gull stork finch raven heron falcon wren goose",
    "fish": "trout salmon carp pike cod tuna herring perch eel shark bass sole sardine haddock catfish halibut",
    "insect": "ant bee wasp moth beetle cricket fly gnat termite locust hornet flea mosquito butterfly ladybug mantis",
    "fruit": "apple pear plum peach cherry grape lemon lime mango banana melon fig apricot papaya kiwi date",
    "flower": "rose tulip lily daisy orchid violet poppy iris lotus peony jasmine dahlia lavender daffodil marigold aster",
    "vehicle": "car truck bus train tram bicycle boat ship plane van taxi scooter tractor ferry canoe sled",
    "instrument": "piano violin flute drum harp guitar trumpet cello organ banjo oboe tuba lute bugle clarinet fiddle",
    "garment": "shirt coat skirt dress sock glove scarf hat vest jacket sweater belt robe shoe boot trouser",
}
KIND_QUESTIONS = ("what kind of thing is {x} ?", "which group does {x} belong to ?", "tell me the kind of {x} .")

TOOLS = {
    "knife": "slice bread|cut cheese|peel a potato|carve meat",
    "scissors": "cut paper|trim hair|cut cloth|shorten a thread",
    "saw": "cut wood|shorten a plank|fell a tree|cut a branch",
    "hammer": "drive a nail|break a stone|mend a fence|crack a nut",
    "shovel": "dig a hole|move sand|plant a tree|clear snow",
    "broom": "sweep the floor|clean the porch|gather leaves|remove dust",
    "needle": "sew a button|mend a shirt|close a wound|make a dress",
    "pen": "write a letter|sign a paper|fill a form|note a number",
    "brush": "paint a wall|clean teeth|groom a horse|coat a door",
    "ladder": "reach the roof|pick high fruit|change a bulb|climb a wall",
    "rope": "tie a boat|lead a cow|hang laundry|tow a car",
    "bucket": "carry water|wash the car|fetch milk|empty a boat",
    "spoon": "eat soup|stir tea|taste sauce|feed a baby",
    "fork": "eat pasta|hold a steak|eat salad|beat eggs",
    "oven": "bake a cake|roast a chicken|warm a pie|dry herbs",
    "kettle": "boil water|make tea|make coffee|heat water",
    "lamp": "read at night|light a room|see in a cave|work in the dark",
    "key": "open a door|start an engine|lock a chest|enter a house",
    "clock": "tell the time|wake early|time a race|catch a train",
    "map": "find a road|plan a trip|find a village|cross a desert",
    "mirror": "see your face|check your hair|shave a beard|try a dress",
    "umbrella": "stay dry|walk in rain|wait in a storm|shield from hail",
    "soap": "wash hands|clean a shirt|wash a dog|remove dirt",
    "towel": "dry hands|dry a plate|lie on a beach|leave a bath",
    "scale": "weigh flour|weigh a parcel|sell gold|check your weight",
    "ruler": "draw a line|measure a page|measure a desk|mark a square",
    "camera": "take a picture|record a wedding|film a bird|keep a memory",
    "phone": "call a friend|order a taxi|call for help|talk from far away",
    "net": "catch a fish|catch a butterfly|stop a ball|play tennis",
    "pump": "fill a tyre|drain a cellar|raise water|fill a balloon",
    "glue": "fix a cup|join paper|stick a stamp|build a model",
    "match": "light a fire|light a candle|start a stove|burn a letter",
}
TOOL_QUESTIONS = ("what do you need to {x} ?", "which tool helps to {x} ?", "tell me the tool to {x} .")

FEELINGS = {
    "happy": "win a prize|meet a friend|hear good news|see the sun|get a gift",
    "sad": "lose a ring|say goodbye|hear bad news|miss your mother|see a grave",
    "angry": "get cheated|find your car broken|hear a lie|get pushed|pay too much",
    "afraid": "hear a wolf|fall from a roof|see a ghost|meet a robber|enter a cave",
    "tired": "work all night|run a mile|climb a hill|carry stones|sleep too little",
    "proud": "finish a book|pass a test|build a house|save a child|lead a team",
    "bored": "wait all day|hear a speech|count sheep|watch paint dry|do nothing",
    "surprised": "find a coin|see a magician|meet a twin|open a secret door|hear thunder",
    "lonely": "live without friends|eat without company|move far away|sail without crew|spend winter on a hill",
    "hungry": "skip lunch|smell fresh bread|fast for a day|see a feast|miss dinner",
    "thirsty": "cross a desert|eat salt|sing for hours|stand in the heat|sweat a lot",
    "calm": "sit by a lake|drink warm tea|hear soft music|breathe slowly|rest in a garden",
    "jealous": "see a rival win|lose a lover|watch others eat|hear of rich people|share your toy",
    "ashamed": "break a vase|tell a lie|fail a test|spill wine|forget a birthday",
    "sick": "eat bad meat|catch a cold|drink sea water|ride a rough ship|swallow poison",
    "grateful": "get help|receive flowers|hear kind words|find a doctor|escape a fire",
}
FEELING_QUESTIONS = (
    "how do you feel when you {x} ?",
    "you {x} . what do you feel ?",
    "tell me the feeling when you {x} .",
)

YESNO = {
    "is {x} alive ?": ("bird fish insect flower", "vehicle instrument garment"),
    "does {x} have legs ?": ("bird insect", "fish fruit flower vehicle"),
    "did people make {x} ?": ("vehicle instrument garment", "bird fish insect fruit flower"),
    "does {x} grow on a plant ?": ("fruit flower", "bird fish vehicle instrument"),
}
"""Question about a word -> the kinds for which the answer is yes, and no."""
YESNO_FRAMES = ("yes or no , {x}", "tell me , {x}", "is it so , {x}")

SUM_QUESTION = "what is {a} plus {b} ?"
LARGEST_SUMMAND = 24

SLOTS = {
    "who": "tom ann bob eva jim amy max sue leo zoe ben ida",
    "colour": "red blue green white black brown pink grey golden purple",
    "thing": "box lamp chair bottle bag plate book ball tent kite",
}
"""What a passage tells, and the values."""
PASSAGES = ("{who} had the {colour} {thing} .", "the {colour} {thing} was with {who} .")
PASSAGE_QUESTIONS = {
    "who": ("who had the {thing} ?", "the {thing} was with"),
    "colour": ("what colour was the {thing} ?", "the {thing} was"),
    "thing": ("what did {who} have ?", "{who} had the"),
}
"""Slot asked for -> question and start of the answering sentence."""
