"""The demo's words, and a function that fills templates with them. Stories and task rows use the same words."""

import random
import re

_SLOT = re.compile(r"\{([a-z]+)(\d*)\}")

LEXICON: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split(", "))
    for kind, words in {
        "name": "anna, ben, carla, david, emma, felix, grace, henry, ivy, jack, kate, leo, maria, noah, olga, paul, "
        "rosa, sam, tina, viktor, wendy, yusuf, zoe, oscar, nina, marco, lucy, karl, judy, igor, helen, "
        "george, fiona, erik, daisy, colin",
        "city": "paris, london, rome, berlin, madrid, vienna, oslo, dublin, lisbon, athens, prague, warsaw, cairo, "
        "tokyo, delhi, boston, chicago, denver, dallas, miami, toronto, sydney, lima, quito, havana, geneva, "
        "milan, porto, seville, bergen",
        "food": "soup, pizza, pasta, rice, salad, bread, cheese, cake, fish, chicken, curry, stew, noodles, pancakes, "
        "dumplings, burger, omelette, pie, porridge, lasagna, sandwich, tacos",
        "fruit": "apples, pears, plums, cherries, lemons, grapes, melons, oranges, peaches, berries, eggs, onions, "
        "carrots, milk, flour, sugar",
        "animal": "dog, cat, horse, rabbit, fox, bear, duck, goat, owl, mouse, sheep, parrot, turtle, donkey, wolf",
        "colour": "red, blue, green, yellow, white, black, orange, purple, brown, pink, silver, golden",
        "thing": "ball, book, hat, coat, kite, drum, boat, bag, box, key, map, cup, clock, coin, letter, ring, chair, "
        "bike, rope, basket",
        "room": "kitchen, bedroom, bathroom, hall, garage, office, garden, attic, cellar, porch",
        "device": "lamp, heater, fan, radio, screen, speaker, blinds, oven, camera, alarm",
        "day": "monday, tuesday, wednesday, thursday, friday, saturday, sunday",
        "month": "january, february, march, april, may, june, july, august, september, october, november, december",
        "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve",
        "part": "morning, afternoon, evening, night",
        "place": "park, river, market, station, school, church, library, bridge, beach, forest, museum, harbour",
        "venue": "the golden lion, the blue moon, the old mill, the green door, the red fox, the silver spoon, the "
        "white horse, the black swan, the sunny corner, the little boat, the wild rose, the stone bridge",
        "cuisine": "italian, french, indian, chinese, greek, spanish, turkish, mexican, japanese, polish",
        "price": "cheap, moderate, expensive",
        "good": "good, great, lovely, wonderful, excellent, delicious, charming, brilliant, superb, pleasant, "
        "delightful, perfect",
        "bad": "bad, awful, terrible, horrible, dreadful, boring, rude, dirty, disgusting, poor, nasty, useless",
        "plain": "average, ordinary, usual, normal, common, fine, fair, middling",
        "job": "teacher, doctor, baker, farmer, pilot, sailor, painter, singer, nurse, driver, tailor, gardener",
        "weather": "rain, snow, sun, wind, fog, storm",
        "music": "jazz, rock, folk, opera, blues, soul, disco, techno",
        "aspect": "food, service, staff, music, view, room, waiter, garden, wine, menu",
        "verb": "ran, walked, jumped, danced, sailed, drove, rode, climbed, hurried, wandered",
        "mood": "happy, sad, tired, hungry, angry, brave, scared, proud, calm, curious",
        # One list of words for each topic, so that its words alone identify it.
        "sport": "goal, match, team, coach, league, referee, tennis, trophy, striker, stadium, race, medal",
        "money": "bank, loan, shares, market, profit, price, tax, budget, investor, currency, debt, bonus",
        "science": "planet, atom, experiment, telescope, energy, robot, theory, gene, comet, magnet, crystal",
        "health": "hospital, medicine, fever, patient, surgeon, vaccine, diet, clinic, heart, bones, sleep, virus",
        "law": "court, judge, lawyer, trial, prison, witness, police, thief, verdict, crime, appeal, jury",
        "school": "pupil, lesson, exam, classroom, homework, grammar, student, campus, lecture, spelling, essay",
    }.items()
}


def fill(template: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Fill each `{kind}` or `{kind2}` slot with a word of that kind. No two slots get the same word.

    Return the text and the words by slot, from which a row's answer can be made.
    """
    words: dict[str, str] = {}
    for slot in dict.fromkeys(_SLOT.findall(template)):
        kind, _ = slot
        free = [word for word in LEXICON[kind] if word not in words.values()]
        words["".join(slot)] = rng.choice(free)
    return _SLOT.sub(lambda match: words[match[1] + match[2]], template), words
