"""Where a figure becomes a finding: every threshold of the checks, with its reason.

Owns the numbers alone. Pixels count from 0 to 255.
"""

from __future__ import annotations

# --- pictures --------------------------------------------------------------------------------------

BLACK = 4.0
"""A picture whose brightest channel stays at or below this shows nothing; a decode of NaN gives 0 everywhere."""
FLAT = 2.0
"""Standard deviation in every channel: drawings on plain ground reach 20, a broken model's one colour less than 1."""
NOISE_SHARE = 0.8
"""Pixel against its four neighbours, as a share of the variance: white noise gives 1.25, photographs below 0.1."""
NOISE_LEAST = 20.0
"""Standard deviation below which noise is film grain on plain ground, not a broken picture."""
NOISE_RATIO = 4.0
"""That share against the parents': fine textures of another style double it, a bad merge's speckles multiply it."""
NOISE_TEXTURE = 0.04
"""A share up to this is texture, whatever the parents': drawn stripes of a few pixels have 0.035."""
NOISE_VISIBLE = 40.0
"""Variance (of a pixel against its neighbours) that an eye sees; below it a ratio says nothing."""
GREY_SATURATION, GREY_CONTRAST = 0.5, 0.75
"""Shares of the parents' least: a mixed VAE takes both, a style with paler colours keeps its contrast."""
COLOURED = 8.0
"""Mean saturation under which the parents' own picture is grey, so that nothing can be lost."""
BURNT_CLIPPED = 0.2
"""More of the channels at their limits than in any parent's: a white ground is in the parents', too."""
BURNT_SATURATION = 1.3
"""Times the parents' most saturated: burnt colours come with it, a dark or bright scene does not."""
CLIPPED_MARGIN = 2
"""Channels this near to 0 or 255 count as clipped: rounding on the way out."""
PART = 0.5
"""Share of the compared pictures that must show it before a model is said to: one may be chance."""

# --- soundness -------------------------------------------------------------------------------------

RIGHT_TYPE = 0.9
"""Squared error, as a share, under which the UNet does predict something: a net that guesses has 1 or more, trained
ones have 0.6 to 0.75 on so artificial latents."""
WRONG_TYPE = 1.5
"""Times that: on these probes the wrong reading of a perfect net costs 0.9, of a poor one half as much again."""
ROUND_TRIP = 0.5
"""Squared error of a picture through the VAE, as a share of its variance. Sound VAEs stay below 0.05."""
ROUND_TRIP_RATIO = 4.0
"""Times the best parent's error: fine-tuned VAEs differ by tenths."""
ROUND_TRIP_LEAST = 0.02
"""An error below this is not seen, whatever its ratio to the parents'."""
SAME_LATENTS = 0.8
"""Cosine of a picture's latents to a parent's: VAEs of a family share their encoder (0.99), SDXL's is another's."""

# --- drift -----------------------------------------------------------------------------------------

MOVED = 0.005
"""Relative change of a block's output: rounding to fp16 and another count of threads stay below 0.002."""
STRAY = 1.1
"""A block's own drift from the nearest parent against the farthest two parents' (with what they inherit): mixes stay
below 0.6, add-differences below 0.9, a block of noise has 1.2 and more."""
STRAY_LEAST = 0.1
"""Drift that a stray block must have: parents that are nearly one are a short ruler."""
MOST = 5
"""Blocks named in a sentence; the chart has all."""

# --- prompts ---------------------------------------------------------------------------------------

FORGOTTEN = 0.25
"""Share of the strongest parent's answer: averages keep 0.57 and more, add-differences 0.48, a LoRA of a style 0.3, a
dead part 0."""
MISTAKEN = 0.06
"""Cosine by which another concept's answer fits better: healthy models stay below 0.04, a swapped word has 0.09."""
ANSWERED = 0.01
"""Change of the prediction, of its size, under which no parent answers either: there is nothing to forget."""
ONLY = 2
"""Concepts still answered, of four or more, at which a model is said to answer to these only."""
UNASKED = 0.4
"""Part of a concept's full answer that a neutral prompt moved along it: half of it is plain to see, a LoRA of a style
has up to 0.35."""
UNASKED_COSINE = 0.3
"""And that it moved this way more than any: other changes of style point nowhere."""
BROUGHT = 0.2
"""Rise of the cosine of two words' answers over the parents': seeds and merges of relatives move it by 0.05."""
