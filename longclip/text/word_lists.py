"""English words, in lower case, by which sentences are told apart."""


def word_set(text: str) -> frozenset[str]:
    """The words of a text, separated by white space."""
    return frozenset(text.split())


TITLES = word_set("Mr Mrs Ms Dr Prof St Mt Ft Gen Capt Col Lt Sgt Rev Hon Gov Sen Rep Pres Messrs Mme Mlle")
"""Come before a name; these have a capital letter."""

ABBREVIATIONS = word_set(
    "approx apt assn assoc aug ave av bldg blvd bros ca cf co corp ct dec dept dist est etc feb fig figs hwy inc incl"
    " jan jr jun jul ltd mar max mph mtn no nos nov oct pkwy pl pp pt pvt rd sec sep sept sq sr tel temp univ vol vs"
    " www"
)

BEFORE_NUMBER = word_set("approx ca ch est fig figs no nos op p pp pt sec tel vol")

UNITS = word_set("cm ft g hrs in kg km lb lbs m min mm oz sq yd yds")

FIRST_WORDS = word_set(
    "a above across additionally all along also although an and another around as at behind below beneath beside"
    " besides between beyond both but by directly down each everything few for four from further he her here his if"
    " immediately in inside it it's its just left many more most multiple near next no on one only other others our out"
    " outside over overall people she since small some several surrounding that that's the their then there there's"
    " these they this those three through to toward towards two under underneath up upon we what when where while with"
    " within you your"
)
"""After an abbreviation these words, with a capital letter, start a sentence."""

UNFINISHED = word_set(
    "a about above across against along an and are around as at behind below beside between by for from has have her"
    " his in inside into is its like near next of off on or our outside over showing that the their this through to"
    " toward towards under was were where which while who whose with within"
)
"""A line that ends with one of these words continues on the next line."""
