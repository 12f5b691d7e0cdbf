"""Words for copying and spelling tasks, and made-up text whose letters follow no rule at all."""

# ruff: noqa: SIM905 - word lists are easier to read as text
from __future__ import annotations

import string
from random import Random

COMMON = (
    "about above across action active actor address advice after again against agree air all almost alone along also "
    "always among anger answer any arm army around art ask author away back bag ball bank base basic bath beach "
    "beauty because become bed before begin behind believe bell below best better between beyond bill birth black "
    "blade blind board body bone border born both bottle bottom bowl box boy brain branch break breath bright bring "
    "broad brother brown build burn business busy button buy call calm camera camp care carry case catch cause center "
    "chain chance change cheap check child choice church circle claim class climb clock close cloth coast coat cold "
    "collect common computer control cook copy corner cost cotton could count couple course court cover crash create "
    "credit cross crowd cry culture cup current curve cut dance danger dark data dead deal dear debt decide defend "
    "degree demand depend design desk detail develop device die dinner direct divide doctor double doubt down draw "
    "dress drink drive drop dry dust duty each ear ease east edge educate effect effort eight either electric else "
    "empty end enemy engine enjoy enough enter equal error even event ever every exact example except expect expert "
    "eye face fact fail fall family fear feather feel fellow field fight figure fill final find finger finish firm "
    "fit fix flat flight float floor fly fold follow food foot force foreign forget fork form forward frame free "
    "fresh friend from front fruit full funny future game gas gather general gentle gift girl give glad glass goal "
    "gold govern grain grand grass great group grow guard guess guest guide gun habit hair half hammer hang happen "
    "harbour hate have head health hear heart heat heavy here hide hill history hit hold hole holiday honest hope "
    "hospital hour huge human hundred hurry hurt image impact include income indeed industry inside into iron island "
    "issue item job join joke judge just keep key kick kill kiss knee know labour lack ladder land language last late "
    "laugh law lay lazy lead leader learn least leather leave leg lesson level library lie life lift limit line lip "
    "liquid list listen live load local lock long look lose loss loud love luck machine main major make manage many "
    "map mark market mass master match material matter maybe meal mean measure meat media meet memory metal method "
    "middle might mile mind minute mirror miss mix modern money month mood more most mother motion mouth move much "
    "muscle must name narrow nation nature near neck need nerve never next noise none north note nothing notice now "
    "object observe offer office often oil old only open operate opinion order other out oven over owner page pain "
    "paint pair parent park part party pass past path pay peace pen perfect perhaps person phone photo piece pipe "
    "place plain plan plant plate play please pocket point police polish poor porter position possible post pot power "
    "press price print prison private prize problem process produce profit proof property protect proud public pull "
    "pump punish purpose push put quality quarter question quite race radio rain raise range rate reach read ready "
    "real reason receive record red regret relation remember repeat report rest result return reward rhythm rice ride "
    "right ring rise road rod roll roof room root rough round row rub rule run safe sail salt same sand save say "
    "scale science sea seat second secret see seed seem sell send sense serious serve seven shade shake shame sharp "
    "shelf ship shirt shock shoe shop short should shoulder show shut side sign silk simple since sing sister size "
    "skill skin skirt sky sleep slip slope slow smart smash smell smile smoke smooth snake society soft soil solid "
    "some song soon sort sound soup south space speak special spend sponge spoon spread square stage stamp stand "
    "start state station stay steam steel step stick still stitch stomach stone stop store storm straight strange "
    "street stretch strong structure study stuff such sudden sugar suggest summer support sure surprise swim system "
    "tail take talk tall taste tax teach team tear than thank that theory thick thing think third those thought "
    "thread throat through throw thumb thunder ticket tight till time tired title toe together tomorrow tongue tool "
    "top total touch toward town trade travel treat trick trouble trousers trust try turn twist type under unit until "
    "up use usual value verse very vessel view visit wait walk wall want war warm wash waste watch wave wax way we "
    "wealth weather week weight well west wheel when where which while whip whistle who whole why wide wife wild will "
    "wind wine wing wire wise wish with woman wonder wood wool word work world worm worry would wound write wrong "
    "year yesterday yet you"
).split()


def scramble(rng: Random) -> str:
    """1 to 10 random characters, mostly lower-case letters: trains copying itself, of every token there is."""
    kind = rng.random()
    if kind < 0.6:
        letters = string.ascii_lowercase
    elif kind < 0.8:
        letters = string.ascii_letters
    else:
        letters = string.ascii_letters + string.digits + string.punctuation.replace("<", "").replace("|", "")
    return "".join(rng.choices(letters, k=rng.randint(1, 10)))


def phrase(rng: Random, most: int = 8) -> str:
    """1 to `most` common or random words, sometimes written as a sentence."""
    words = [scramble(rng) if rng.random() < 0.3 else rng.choice(COMMON) for _ in range(rng.randint(1, most))]
    text = " ".join(words)
    roll = rng.random()
    if roll < 0.3:
        return text[0].upper() + text[1:] + rng.choice(".!?")
    return text.title() if roll < 0.35 else text
