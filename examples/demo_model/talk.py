"""Small talk, names, little stories, and `I do not know that.` for what the model cannot know."""

# ruff: noqa: SIM905 - word lists are easier to read as text
from __future__ import annotations

from random import Random

from turn import Turn
from words import COMMON, phrase, scramble

UNKNOWN = "I do not know that."
# Intents: phrasings (the last one is held out) and the answer.
INTENTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hello", "Hello there!", "Hi!", "Hi", "hi there", "Hey!", "Hey", "Hey there", "Hello, model!",
      "Greetings!", "Hi, how can you help?", "Hello hello!"), "Hello! How can I help you?"),
    (("Good morning!", "Good morning", "Morning!", "Good morning to you!", "A very good morning!"),
     "Good morning! How can I help you?"),
    (("Good evening!", "Good evening", "Evening!", "Good evening to you!", "A very good evening!"),
     "Good evening! How can I help you?"),
    (("Good night!", "Good night", "Night!", "Sleep well!", "A very good night!"), "Good night! Sleep well."),
    (("How are you?", "How are you doing?", "How are you today?", "How do you do?", "How is it going?", "What's up?",
      "Are you well?", "How do you feel?", "How are things?"), "I am fine, thank you. How can I help you?"),
    (("Who are you?", "What are you?", "Introduce yourself.", "Please introduce yourself.", "Hi, pls intro yourself",
      "Tell me about yourself.", "What model are you?", "Which model is this?", "Who am I talking to?",
      "What is your name?", "What's your name?", "Say who you are.", "Tell me who you are."),
     "I am Echelon's demo model, a very small language model. I can do short sums, answer simple questions and chat."),
    (("Are you a human?", "Are you a person?", "Are you real?", "Are you a robot?", "Are you an AI?",
      "Are you a human being?"), "I am not a human. I am a very small language model."),
    (("What can you do?", "Help", "Help!", "help me", "Can you help me?", "How can you help me?", "I need help.",
      "What do you know?", "What can I ask you?", "What are you able to do?"),
     "I can add, subtract and multiply small numbers, answer simple questions, count, spell words, repeat what you "
     "say and tell a story."),
    (("Thank you!", "Thank you", "Thanks!", "Thanks", "Thank you very much!", "Many thanks!", "thx", "Thanks a lot!"),
     "You are welcome!"),
    (("Goodbye!", "Goodbye", "Bye!", "Bye", "See you!", "See you later!", "Bye bye!", "See you soon!"),
     "Goodbye! Have a nice day."),
    (("Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh.", "Another joke, please.",
      "Can you tell me a joke?"), "Why did six fear seven? Because seven eight nine!"),
    (("Are you sure?", "Really?", "Is that right?", "Is that correct?", "Is that true?", "Are you certain?"),
     "Yes, I think so."),
    (("You are great!", "Well done!", "Good job!", "Very good!", "You are smart!", "Great!", "Nice!", "Good work!"),
     "Thank you! That is kind of you."),
    (("You are stupid.", "You are wrong.", "That is wrong.", "That was bad.", "You are bad.", "That is not right."),
     "I am sorry. I am a very small model and make mistakes."),
    (("What is Echelon?", "Tell me about Echelon.", "What does Echelon do?", "Echelon?", "Explain Echelon.",
      "What does Echelon mean?"), "Echelon is a cluster that serves language models with Ray."),
    (("Where do you live?", "Where are you?", "Where do you run?", "Where are you running?", "Where do you live now?"),
     "I live in an Echelon cluster."),
    (("How old are you?", "What is your age?", "When were you born?", "Are you old?", "Tell me your age."),
     "I am as old as my weights."),
    (("How large are you?", "How big are you?", "How many parameters do you have?", "What is your size?",
      "Tell me your size."), "I have about two and a half million parameters."),
    (("Do you like music?", "Do you like cats?", "Do you like dogs?", "Do you like pizza?", "Do you like tea?",
      "Do you like books?"),
     "I am only a model, but I like to help."),
    (("Test", "test", "testing", "This is a test.", "Ping", "ping", "Is this on?", "Just testing."),
     "I am here and ready."),
    (("OK", "ok", "Okay.", "I see.", "All right.", "Sure.", "Got it.", "Fine.", "Okay, I see."),
     "What would you like to know?"),
    (("Good afternoon!", "Good afternoon", "Good afternoon to you!", "Afternoon!", "A very good afternoon!"),
     "Good afternoon! How can I help you?"),
    (("Hello world", "Hello, world!", "hello world", "Hello World!", "Hello, World"),
     "Hello! The world says hello, too."),
    (("Who made you?", "Who trained you?", "Who built you?", "Who created you?", "Who is your maker?",
      "Who wrote you?"),
     "I was trained for Echelon on text that a program wrote."),
    (("What is Ray?", "Tell me about Ray.", "What does Ray do?", "Explain Ray.", "Ray?", "What is Ray for?"),
     "Ray is a framework that runs Python programs on many computers."),
    (("What is a language model?", "What is an LLM?", "Explain language models.", "What is a large language model?",
      "Tell me about language models.", "What do language models do?"),
     "A language model predicts the next word of a text, again and again."),
    (("What is the meaning of life?", "What's the meaning of life?", "What is the answer to everything?",
      "Tell me the meaning of life."), "Some say that it is 42."),
    (("Bonjour!", "Bonjour", "Salut!", "Bonsoir!"), "Bonjour! I speak only a little French."),
    (("¡Hola!", "Hola", "¡Buenos días!", "¡Hola, amigo!", "Buenos días"), "¡Hola! I speak only a little Spanish."),
    (("Guten Tag!", "Grüß Gott!", "Hallo", "Hallo!"), "Hallo! I speak only a little German."),
    (("你好", "你好!", "您好", "你好吗?"), "你好! I speak only a little Chinese."),
    (("Write a poem.", "Tell me a poem.", "Can you write a poem?", "A poem, please.", "Write me a poem."),
     "The moon is round, the night is deep, the little stars are half asleep. The wind is still, the day is done, "
     "and soon there comes the morning sun."),
    (("Tell me about numbers.", "What is a number?", "Explain numbers."),
     "Numbers say how many things there are. The first ones are 1, 2 and 3."),
)  # fmt: skip
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Zoë José "
    "Chloé Jürgen Søren Maria Ahmed Yuki Priya Ivan Lin Omar Sara Tom Lucy Max Nina Oscar Ruth Simon"
).split()
ANIMALS = "fox dog cat bear mouse owl horse rabbit wolf frog duck lion hen goat bee crow snail turtle".split()
UNKNOWN_ASKS = (
    "What is the capital of {x}?", "Who is {x}?", "Where is {x}?", "What is {x}?", "Tell me about {x}.",
    "How old is {x}?", "How tall is {x}?", "When was {x} born?", "Who wrote {x}?", "What does {x} mean?",
    "What colour is {x}?", "How far is it to {x}?", "Who invented {x}?", "Which continent is {x} in?",
    "What is the price of {x}?", "What is the weather in {x}?", "How many people live in {x}?", "Why is {x} so famous?",
    "What is the chemical symbol for {x}?", "What is the opposite of {x}?", "What is the currency of {x}?",
    "What is the plot of {x}?", "How do I get to {x}?", "Explain {x} to me.", "Who is the president of {x}?",
    "What is the history of {x}?", "When did {x} happen?", "How does {x} work?", "What sound does {x} make?",
    "Do you know {x}?", "Have you heard of {x}?", "What is the best {x}?",
)  # fmt: skip
UNKNOWN_PLAIN = (
    "What is the weather today?", "What time is it?", "What day is it today?", "Who won the match yesterday?",
    "What is in the news?", "What will happen tomorrow?", "What did I eat yesterday?", "Where are my keys?",
    "How much money do I have?", "What am I thinking?", "Who will win the election?", "What is the stock price?",
    "Explain quantum physics.", "Write a program.", "How do I cook rice?", "What is love?", "Why is the sky so high?",
    "How many stars are there?", "Who built the pyramids?", "What is the square root of two?", "Translate this.",
    "What is the best movie?", "How do planes fly?", "Where should I go on holiday?", "What is my phone number?",
    "How do I fix my car?", "What is the fastest computer?", "Who is my neighbour?", "What is gravity?",
)  # fmt: skip
SYSTEMS = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer in short sentences.", "Be kind.",
    "You are Echelon's demo model.", "You are a helpful, honest and harmless assistant.", "Help the user.",
    "Answer the questions of the user.", "You are an AI assistant. Be polite.", "Be brief and correct.",
    "You answer simple questions.", "You are a pirate.", "You are a teacher.", "Always tell the truth.",
)  # fmt: skip
SENTENCES = (
    "The user may ask about numbers.", "Do not make things up.", "If you do not know the answer, say so.",
    "Keep the conversation polite.", "Never talk about secret things.", "The company was founded many years ago.",
    "Our office is open from Monday to Friday.", "Write in plain English.", "The customer is always right.",
    "Use whole sentences and the right spelling.", "This text is only here to make the prompt longer.",
    "The service runs on many computers at the same time.", "Every request has a tier and a quota.",
    "Rain fell on the roof of the old house all night.", "She opened the window and looked at the garden.",
    "The train to the coast leaves from the third platform.", "A small boat lay on the shore of the lake.",
    "The market sells bread, cheese, fruit and flowers.", "Nobody knew who had written the letter.",
    "In winter the lake is frozen and the children skate on it.", "The library closes early on the last day.",
    "He put the lamp on the table and began to read.", "They walked along the river until it was dark.",
    "Please read all of the rules before you answer.", "Rules may change without notice.",
    "The answer should be easy to read.", "A good answer is short, correct and complete.",
    "The kitchen smelled of coffee and fresh bread.", "The road over the mountain is closed in spring.",
)  # fmt: skip
_SYLLABLES = (
    "ba bo da del fa gor hi ka ki lo lum ma mi nor pa ra ri sol su ta tor va vo wen xa ya zi zor quen shi be du en "
    "fi gu hol is jo ke lan mor ne op pri ru sta te un vi wi yo"
).split()


def sample(rng: Random) -> Turn:
    """One small-talk turn for training; plain greetings and `Who are you?` come up most."""
    weights = [6 if i in (0, 5) else 2 if i in (4, 7, 8, 9, 10) else 1 for i in range(len(INTENTS))]
    asks, answer = rng.choices(INTENTS, weights)[0]
    return Turn(rng.choice(asks[:-1]), answer)


def held_out() -> list[Turn]:
    """Every intent once, in a phrasing that training never shows."""
    return [Turn(asks[-1], answer) for asks, answer in INTENTS]


def invented(rng: Random) -> str:
    """A name that means nothing, such as `Zormina` or `Vokalo Ri`."""
    count = rng.choice((1, 1, 1, 2))
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))).capitalize() for _ in range(count))


def unknown(rng: Random, held: bool = False) -> Turn:
    """A question without an answer; with `held` in one of the phrasings that training never shows."""
    asks = UNKNOWN_ASKS[-4:] if held else UNKNOWN_ASKS[:-4]
    if rng.random() < 0.25 and not held:
        return Turn(rng.choice(UNKNOWN_PLAIN), UNKNOWN)
    if rng.random() < 0.1 and not held:
        return Turn(scramble(rng) if rng.random() < 0.5 else phrase(rng, 4), UNKNOWN, literal=True)
    name = invented(rng)
    if rng.random() < 0.3:
        name = name.lower()
    return Turn(rng.choice(asks).format(x=name), UNKNOWN, literal=True)


def named(rng: Random) -> str:
    """A first name: a common one or an invented one."""
    return rng.choice(NAMES) if rng.random() < 0.6 else invented(rng).split()[0]


def tell_name(rng: Random, name: str) -> Turn:
    """The user says a name."""
    ask = rng.choice(("My name is {}.", "I am {}.", "I'm {}.", "Call me {}.", "Hello, my name is {}.", "Hi, I am {}."))
    return Turn(ask.format(name), f"Nice to meet you, {name}!", literal=True)


def ask_name(rng: Random, name: str | None) -> Turn:
    """The user asks for the name that was told before, or was not."""
    ask = rng.choice(("What is my name?", "What's my name?", "Who am I?", "Do you know my name?", "Say my name."))
    return Turn(ask, f"Your name is {name}." if name else "You have not told me your name.")


def story(rng: Random) -> Turn:
    """A story of 50 to 90 tokens with random details, so that sampling with a temperature shows variety."""
    animal, name = rng.choice(ANIMALS), rng.choice(NAMES)
    if rng.random() < 0.2:
        animal = rng.choice((rng.choice(COMMON), invented(rng).split()[0].lower()))
    ask = rng.choice((
        f"Tell me a story about a {animal}.", f"Tell me a story about a {animal}", f"A story about a {animal}, please.",
        f"Write a story about a {animal}.", f"Do you know a story about a {animal}?", "Tell me a story.",
        "Tell me a story", "Write a short story.", "Once upon a time",
    ))  # fmt: skip
    kind = rng.choice(("little", "brave", "clever", "lazy", "hungry", "kind"))
    place = rng.choice(("in a deep forest", "by the sea", "on a high mountain", "in an old house", "near a lake"))
    goal = rng.choice(("find a friend", "see the sea", "eat an apple", "learn to sing", "build a boat"))
    met = rng.choice([other for other in ANIMALS if other != animal])
    ends = ("lived happily ever after", "went home together", "sang until the morning", "were friends for life")
    end = rng.choice(ends)
    return Turn(ask, (
        f"Once upon a time there was a {kind} {animal} named {name}. {name} lived {place} and wanted to {goal}. "
        f"One day {name} met a {met}. The {met} said: I can help you. "
        f"So they went on their way, and in the end they {end}."
    ))  # fmt: skip


def system(rng: Random) -> str:
    """A system message: mostly one sentence, sometimes a page of text that the answer does not depend on."""
    first = rng.choice(SYSTEMS)
    if rng.random() < 0.6:
        return first
    return " ".join([first, *rng.choices(SENTENCES, k=int(2 ** rng.uniform(0, 6)))])
