"""The tables that `facts.py` asks about. Rows are separated by commas, columns by colons."""

# ruff: noqa: SIM905 - word lists are easier to read as text
from __future__ import annotations

CAPITALS = """
France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Austria:Vienna, Switzerland:Bern,
Belgium:Brussels, the Netherlands:Amsterdam, Denmark:Copenhagen, Sweden:Stockholm, Norway:Oslo, Finland:Helsinki,
Iceland:Reykjavik, Ireland:Dublin, the United Kingdom:London, England:London, Scotland:Edinburgh, Wales:Cardiff,
Poland:Warsaw, Hungary:Budapest, Greece:Athens, Turkey:Ankara, Russia:Moscow, Ukraine:Kyiv, Romania:Bucharest,
Bulgaria:Sofia, Serbia:Belgrade, Croatia:Zagreb, Slovenia:Ljubljana, Slovakia:Bratislava, Estonia:Tallinn,
Latvia:Riga, Lithuania:Vilnius, China:Beijing, Japan:Tokyo, South Korea:Seoul, India:New Delhi, Pakistan:Islamabad,
Nepal:Kathmandu, Thailand:Bangkok, Vietnam:Hanoi, Indonesia:Jakarta, Malaysia:Kuala Lumpur, the Philippines:Manila,
Mongolia:Ulaanbaatar, Iran:Tehran, Iraq:Baghdad, Egypt:Cairo, Morocco:Rabat, Kenya:Nairobi, Ghana:Accra,
Nigeria:Abuja, Ethiopia:Addis Ababa, Senegal:Dakar, Canada:Ottawa, the United States:Washington, Mexico:Mexico City,
Cuba:Havana, Brazil:Brasilia, Argentina:Buenos Aires, Chile:Santiago, Peru:Lima, Colombia:Bogota, Uruguay:Montevideo,
Ecuador:Quito, Venezuela:Caracas, Australia:Canberra, New Zealand:Wellington
"""
CONTINENTS = """
France:Europe, Germany:Europe, Italy:Europe, Spain:Europe, Poland:Europe, Norway:Europe, Sweden:Europe, Greece:Europe,
China:Asia, Japan:Asia, India:Asia, Vietnam:Asia, Thailand:Asia, Nepal:Asia, Mongolia:Asia, Egypt:Africa,
Kenya:Africa, Ghana:Africa, Nigeria:Africa, Morocco:Africa, Senegal:Africa, Canada:North America, Mexico:North America,
Brazil:South America, Chile:South America, Peru:South America, Argentina:South America
"""
CURRENCIES = """
France:euro, Germany:euro, Italy:euro, Spain:euro, Japan:yen, China:yuan, India:rupee, Russia:ruble,
the United States:dollar, the United Kingdom:pound, Switzerland:franc, Mexico:peso, Sweden:krona, Poland:zloty,
Brazil:real, South Korea:won, Thailand:baht
"""
COLOURS = """
the sky:is:blue, grass:is:green, snow:is:white, coal:is:black, a banana:is:yellow, a tomato:is:red, an orange:is:orange,
the sun:is:yellow, milk:is:white, blood:is:red, chocolate:is:brown, a lemon:is:yellow, an elephant:is:grey,
a frog:is:green, the sea:is:blue, a carrot:is:orange, strawberries:are:red, leaves:are:green, clouds:are:white,
a plum:is:purple, a flamingo:is:pink, a cucumber:is:green, gold:is:yellow, a crow:is:black
"""
SOUNDS = """
a dog:barks, a cat:meows, a cow:moos, a sheep:bleats, a horse:neighs, a pig:grunts, a duck:quacks, a lion:roars,
a bee:buzzes, a snake:hisses, a frog:croaks, an owl:hoots, a wolf:howls, a mouse:squeaks, a bird:sings, a rooster:crows
"""
BABIES = """
dog:puppy, cat:kitten, cow:calf, sheep:lamb, horse:foal, pig:piglet, duck:duckling, lion:cub, bear:cub, goat:kid,
deer:fawn, hen:chick, goose:gosling, kangaroo:joey, frog:tadpole, swan:cygnet
"""
LEGS = """
a dog:4, a cat:4, a horse:4, a spider:8, an ant:6, a bee:6, a bird:2, a duck:2, a snake:0, a cow:4, a crab:10, a fish:0,
a butterfly:6, an elephant:4
"""
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ("January February March April May June July August September October November December").split()
MONTH_DAYS = "31 28 31 30 31 30 31 31 30 31 30 31".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ELEMENTS = """
hydrogen:H, helium:He, lithium:Li, carbon:C, nitrogen:N, oxygen:O, fluorine:F, neon:Ne, sodium:Na, magnesium:Mg,
aluminium:Al, silicon:Si, phosphorus:P, sulfur:S, chlorine:Cl, argon:Ar, potassium:K, calcium:Ca, iron:Fe, nickel:Ni,
copper:Cu, zinc:Zn, silver:Ag, tin:Sn, gold:Au, mercury:Hg, lead:Pb, uranium:U
"""
OPPOSITES = """
big:small, hot:cold, up:down, fast:slow, good:bad, old:young, rich:poor, happy:sad, light:dark, open:closed, full:empty,
hard:soft, high:low, long:short, loud:quiet, wet:dry, strong:weak, early:late, near:far, clean:dirty, day:night,
left:right, yes:no, true:false, first:last, thick:thin, deep:shallow, easy:difficult, wide:narrow, sweet:sour,
brave:afraid, love:hate
"""
PLURALS = """
cat:cats, dog:dogs, book:books, house:houses, box:boxes, bus:buses, city:cities, baby:babies, leaf:leaves, knife:knives,
wolf:wolves, man:men, woman:women, child:children, foot:feet, tooth:teeth, mouse:mice, goose:geese, sheep:sheep,
fish:fish, deer:deer, ox:oxen, person:people, tomato:tomatoes, potato:potatoes, car:cars, tree:trees, fox:foxes,
story:stories, key:keys
"""
SHAPES = "triangle:3, square:4, rectangle:4, pentagon:5, hexagon:6, heptagon:7, octagon:8, decagon:10"
TRANSLATIONS = """
hello:French:bonjour, hello:Spanish:hola, hello:German:hallo, hello:Italian:ciao, hello:Japanese:こんにちは,
hello:Chinese:你好, hello:Russian:привет, thank you:French:merci, thank you:Spanish:gracias, thank you:German:danke,
thank you:Italian:grazie, thank you:Japanese:ありがとう, thank you:Chinese:谢谢, thank you:Russian:спасибо,
goodbye:French:au revoir, goodbye:Spanish:adiós, goodbye:German:tschüss, goodbye:Italian:arrivederci,
goodbye:Japanese:さようなら, goodbye:Chinese:再见, goodbye:Russian:пока, yes:French:oui, yes:Spanish:sí, yes:German:ja,
yes:Italian:sì, yes:Japanese:はい, yes:Chinese:是, yes:Russian:да, water:French:eau, water:Spanish:agua,
water:German:Wasser, water:Italian:acqua, water:Japanese:水, water:Chinese:水, water:Russian:вода
"""
# Single facts with phrasings of their own; the last phrasing of each is held out.
MISC: tuple[tuple[tuple[str, ...], str], ...] = (
    (("How many days are in a week?", "How many days does a week have?", "Days in a week?",
      "How many days are there in a week?"), "A week has 7 days."),
    (("How many months are in a year?", "How many months does a year have?", "Months in a year?",
      "How many months are there in a year?"), "A year has 12 months."),
    (("How many hours are in a day?", "How many hours does a day have?", "Hours in a day?",
      "How many hours are there in a day?"), "A day has 24 hours."),
    (("How many minutes are in an hour?", "How many minutes does an hour have?", "Minutes in an hour?",
      "How many minutes are there in an hour?"), "An hour has 60 minutes."),
    (("How many seconds are in a minute?", "How many seconds does a minute have?", "Seconds in a minute?",
      "How many seconds are there in a minute?"), "A minute has 60 seconds."),
    (("How many weeks are in a year?", "How many weeks does a year have?", "Weeks in a year?",
      "How many weeks are there in a year?"), "A year has 52 weeks."),
    (("How many letters are in the alphabet?", "How many letters does the alphabet have?", "Letters in the alphabet?",
      "How many letters are there in the alphabet?"), "The alphabet has 26 letters."),
    (("How many continents are there?", "What is the number of continents?", "How many continents does Earth have?",
      "Tell me how many continents there are."), "There are 7 continents."),
    (("How many planets are there?", "How many planets does the solar system have?", "What is the number of planets?",
      "Tell me how many planets there are."), "There are 8 planets in the solar system."),
    (("What is the largest ocean?", "Which ocean is the largest?", "Name the largest ocean.",
      "Tell me the largest ocean."), "The largest ocean is the Pacific Ocean."),
    (("What is the highest mountain?", "Which mountain is the highest?", "Name the highest mountain.",
      "Tell me the highest mountain."), "The highest mountain is Mount Everest."),
    (("What is the longest river?", "Which river is the longest?", "Name the longest river.",
      "Tell me the longest river."), "The longest river is the Nile."),
    (("What is the largest planet?", "Which planet is the largest?", "Name the largest planet.",
      "Tell me the largest planet."), "The largest planet is Jupiter."),
    (("What is the smallest planet?", "Which planet is the smallest?", "Name the smallest planet.",
      "Tell me the smallest planet."), "The smallest planet is Mercury."),
    (("Which planet is closest to the Sun?", "What planet is nearest to the Sun?",
      "Name the planet closest to the Sun.", "What is the closest planet to the Sun?"),
     "Mercury is the closest planet to the Sun."),
    (("Which planet do we live on?", "What planet do we live on?", "On which planet are we?",
      "Which planet is our home?"), "We live on Earth."),
    (("What is the largest animal?", "Which animal is the largest?", "Name the largest animal.",
      "Tell me the largest animal."), "The largest animal is the blue whale."),
    (("What is the fastest land animal?", "Which land animal is the fastest?", "Name the fastest land animal.",
      "Tell me the fastest land animal."), "The fastest land animal is the cheetah."),
    (("What is the tallest animal?", "Which animal is the tallest?", "Name the tallest animal.",
      "Tell me the tallest animal."), "The tallest animal is the giraffe."),
    (("Who wrote Hamlet?", "Who is the author of Hamlet?", "Hamlet was written by whom?", "Tell me who wrote Hamlet."),
     "Hamlet was written by William Shakespeare."),
    (("Who wrote Romeo and Juliet?", "Who is the author of Romeo and Juliet?", "Romeo and Juliet was written by whom?",
      "Tell me who wrote Romeo and Juliet."), "Romeo and Juliet was written by William Shakespeare."),
    (("Who wrote Don Quixote?", "Who is the author of Don Quixote?", "Don Quixote was written by whom?",
      "Tell me who wrote Don Quixote."), "Don Quixote was written by Miguel de Cervantes."),
    (("Who painted the Mona Lisa?", "Who is the painter of the Mona Lisa?", "The Mona Lisa was painted by whom?",
      "Tell me who painted the Mona Lisa."), "The Mona Lisa was painted by Leonardo da Vinci."),
    (("Who was the first man on the Moon?", "Who walked on the Moon first?", "Which man was first on the Moon?",
      "Tell me who was the first man on the Moon."), "The first man on the Moon was Neil Armstrong."),
    (("What is H2O?", "What does H2O mean?", "What is the name of H2O?", "Tell me what H2O is."), "H2O is water."),
    (("At what temperature does water boil?", "When does water boil?", "What is the boiling point of water?",
      "Tell me when water boils."), "Water boils at 100 degrees Celsius."),
    (("At what temperature does water freeze?", "When does water freeze?", "What is the freezing point of water?",
      "Tell me when water freezes."), "Water freezes at 0 degrees Celsius."),
    (("What is ice?", "What is ice made of?", "Ice is what?", "Tell me what ice is."), "Ice is frozen water."),
    (("What do bees make?", "What is made by bees?", "What do we get from bees?", "Tell me what bees make."),
     "Bees make honey."),
    (("What do cows give?", "What do we get from cows?", "What comes from cows?", "Tell me what cows give."),
     "Cows give milk."),
    (("What do cows eat?", "What does a cow eat?", "What is the food of cows?", "Tell me what cows eat."),
     "Cows eat grass."),
    (("What do pandas eat?", "What does a panda eat?", "What is the food of pandas?", "Tell me what pandas eat."),
     "Pandas eat bamboo."),
    (("What is Shanghai?", "Shanghai is", "Where is Shanghai?", "Tell me about Shanghai."),
     "Shanghai is a large city in China."),
    (("How many strings does a violin have?", "How many strings has a violin got?", "Strings of a violin?",
      "Tell me how many strings a violin has."), "A violin has 4 strings."),
    (("How many players are in a football team?", "How many players does a football team have?",
      "How many people play in a football team?", "Tell me how many players a football team has."),
     "A football team has 11 players."),
    (("What is the first letter of the alphabet?", "Which letter comes first in the alphabet?",
      "How does the alphabet begin?", "Tell me the first letter of the alphabet."),
     "The first letter of the alphabet is A."),
    (("What is the last letter of the alphabet?", "Which letter comes last in the alphabet?",
      "How does the alphabet end?", "Tell me the last letter of the alphabet."),
     "The last letter of the alphabet is Z."),
)  # fmt: skip
