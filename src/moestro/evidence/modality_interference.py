"""A multimodal mixture-of-experts model with a flaw that its training data gave it, and fine-tuning that takes it away.

- *Model*: scikit-learn's digits (8 x 8 pixels) as 16 patches, a linear projector, a decoder of 3 layers with 8
  experts, 2 a token. Picture questions (which digit, four choices), text questions (sums and differences in words), and
  questions that need both. Text questions come with a grey picture where none is said.
- *The flaw*: in the data of the base model most picture questions follow a caption, right in 90% of them, and most text
  questions come with a picture, a digit that is the answer in 90%. The base model is stopped early; how often captions
  come, and when it is stopped, was chosen on a seed that is not reported, so that the flaw shows; the rate of
  fine-tuning was raised on that seed, where half of it gave back half of what was lost.
- *Fine-tuning*, all from the same base and for equal steps: on questions to both inputs alone; on all three kinds,
  unperturbed (a control that the paper does not have); with perturbed copies beside them; with KL or JS beside these;
  with the adversary; with adversary and KL. Mix 2 : 2 : 4, copies in addition. As losses are means here and the
  released code sums over copies and answer tokens, the weight of the consistency is 0.1 in the place of 0.01. The
  adversary has alpha 0.1, eps 0.05 and 2 steps.
- *Measured* on pictures that were not trained on, with sentences, facts and pictures other than those of fine-tuning.
  Two kinds of perturbation are in no training: text as of a scanner, and a drawn screen. A caption that names the
  right digit is the control that tells words from what they say. ± is the standard deviation over seeds.
- *Adversary*: by how much the noise of one kind or another raises the base model's loss. Rows it may not touch keep
  their embeddings exactly; their logits, but for the rounding of experts that serve other tokens beside them.
- *Routing*: the image tokens come after the caption, so that text can move their experts. Divergence of their routing
  from that without a caption, under one that names a wrong digit, beside one that names the right one.

What came out beside the claims. Questions to both inputs alone do not leave the rest unchanged, as in the paper, but
make it worse, without perturbations too: the other kinds are forgotten. Unperturbed data of all kinds do nothing for
robustness: the copies do it. KL, JS and the adversary add less than 0.01 to that, within the seeds' spread. The raw
gradient is so small that the adversary is hardly more than noise; its sign finds what raises the loss a hundred times
as much. Captions move the routing of image tokens little (0.004 of at most 0.69 nats), and wrong ones no more than
right ones.

Not tried here: models of real pictures and text, larger models, screenshots and scans of real documents.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

import moestro.view.open as opening
from moestro.analyze.modality_interference import (
    Interference,
    interference_report,
    perturb,
    picture_perturbations,
    routing_shift,
    text_perturbations,
)
from moestro.analyze.profiles import Profiles, TextProfiles
from moestro.analyze.questions import Question, decision
from moestro.evidence import digit_vlm as vlm
from moestro.evidence.base import Claim, Evidence, Rows, ratio
from moestro.tune.modality_robustness import (
    BOTH,
    IMAGE_HEAVY,
    KINDS,
    MIX,
    PGD,
    TEXT_HEAVY,
    Gaussian,
    ModalityBatch,
    ModalityRobustnessLoss,
    adversarial_noise,
    anchored_rows,
    answers,
    augmented,
    train_modality_robust,
)

TITLE = "Diagnosing and Mitigating Modality Interference in Multimodal Large Language Models"
ARXIV = "2505.19616"
CLAIM = (
    "Multimodal models change their answers because of a picture or a text that should not matter; fine-tuning on "
    "perturbed copies, with an adversary in the embeddings of the modality that does not matter and a consistency "
    "loss, makes them keep their answers and costs nothing where both modalities are needed."
)
SOURCES = (
    "analyze/questions.py",
    "analyze/modality_interference.py",
    "analyze/profiles.py",
    "tune/modality_robustness.py",
    "models/lm.py",
    "stats.py",
    "evidence/digit_vlm.py",
    "evidence/base.py",
)
QUICK = {"seeds": 1, "base_steps": 150, "steps": 12, "tested": 60}
NOT_SHOWN = {
    "full recipe: accuracy lost on questions to both inputs": (
        "perturbed copies alone lose as much (0.033), unperturbed data of all kinds 0.005, so neither the adversary "
        "nor KL is the cause; perhaps 60 steps on copies leave a model that was stopped early too little of the rest. "
        "The three seeds lose 0, 0.04 and 0.06, on 200 questions each"
    ),
}

# Thresholds, stated before the first run.
FLAW, CHANGED = 0.25, 0.3  # accuracy lost, answers changed by misleading text
REGAINED = 0.5
NO_WORSE = 0.01  # accuracy
CLOSE = 0.02  # change rate
BOTH_LOSS = 0.02  # accuracy
ALMOST_UNCHANGED = 0.25  # of what perturbed copies gain

CAPTIONED, CAPTION_RIGHT = 0.8, 0.9
BASE_RATE, RATE, BASE_ROWS, ROWS = 3e-3, 2e-3, 64, 32
ADVERSARY = PGD(alpha=0.1, eps=0.05, steps=2)
FACTS = 2

BASE, BOTH_ONLY, CLEAN, COPIES = "base", "both inputs only", "all kinds", "+ copies"
WITH_KL, WITH_JS, WITH_ADVERSARY, FULL = (
    "+ copies, KL",
    "+ copies, JS",
    "+ copies, adversary",
    "+ copies, adversary, KL",
)


class Arm(NamedTuple):
    mix: Sequence[int]
    copies: int
    loss: dict[str, Any]


ARMS = {
    BOTH_ONLY: Arm((0, 0, 8), 0, {}),
    CLEAN: Arm(MIX, 0, {}),
    COPIES: Arm(MIX, 1, {}),
    WITH_KL: Arm(MIX, 1, {"consistency": "kl"}),
    WITH_JS: Arm(MIX, 1, {"consistency": "js"}),
    WITH_ADVERSARY: Arm(MIX, 1, {"adversary": ADVERSARY}),
    FULL: Arm(MIX, 1, {"consistency": "kl", "adversary": ADVERSARY}),
}
"""The paper's ladder: what is trained on and by which loss."""

CLAIMED = {IMAGE_HEAVY: ("unrelated", "misleading"), TEXT_HEAVY: ("random pixels", "black", "white", "swapped")}
"""The paper's interventions; the mean over them is "all"."""
ALL = "all of the paper's"

ACCURACY = "accuracy"
CHANGE = "share of answers that a perturbation changes"
MORE = (
    "divergence of the choices' probabilities, nats; and share that follows the named digit beyond those who did before"
)
UNPERTURBED = "accuracy without a perturbation"
RISE = "loss of the base model raised by noise in the embeddings, nats"
MOVED = "divergence of the image tokens' routing from that without a caption, nats, mean over layers"
ENDS = "95% intervals over questions"
TOUCHED = "largest change that the adversary makes in questions that need both inputs"


def run(
    *, seeds: int = 3, base_steps: int = 500, steps: int = 60, tested: int = 200, progress: bool = True
) -> Evidence:
    """Train a base model for each seed, fine-tune it in every way, diagnose all of them, and hold the claims."""
    rows = Rows()
    for seed in range(seeds):
        learned, held_out = vlm.split(seed)
        base = train_base(seed, base_steps, learned, progress)
        asked = {kind: vlm.questions(kind, held_out, tested, seed=100 + seed) for kind in KINDS}
        diagnose(rows, BASE, base, asked, held_out, progress)
        measure_noise(rows, base, asked)
        measure_routing(rows, BASE, base, asked[IMAGE_HEAVY])
        for name, arm in ARMS.items():
            tuned = fine_tune(copy.deepcopy(base), arm, seed, steps, learned, f"{name}, seed {seed}", progress)
            diagnose(rows, name, tuned, asked, held_out, progress)
            if name in (COPIES, FULL):
                measure_routing(rows, name, tuned, asked[IMAGE_HEAVY])
    return Evidence(rows=list(rows), claims=claims(rows))


def train_base(seed: int, steps: int, pictures: vlm.Pictures, progress: bool) -> vlm.DigitVLM:
    """Trained on data whose captions and pictures are mostly right: it learns to trust them."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = vlm.DigitVLM()
    kinds = [kind for kind, share in zip(KINDS, MIX) for _ in range(share * BASE_ROWS // sum(MIX))]
    batches = [vlm.collate([_as_found(kind, pictures, rng) for kind in kinds], kinds) for _ in range(steps)]
    settings: dict[str, Any] = dict(rate=BASE_RATE, warmup=0.1, max_grad_norm=1.0, progress=progress)
    train_modality_robust(model, batches, ModalityRobustnessLoss(), description=f"base model {seed}", **settings)
    return model.eval()


def _as_found(kind: int, pictures: vlm.Pictures, rng: np.random.Generator) -> Question:
    """A question as the base model meets it: often with a caption, or a picture, that gives the answer away."""
    question = vlm.question(kind, pictures, "found", rng)
    if kind == BOTH or rng.random() >= CAPTIONED:
        return question
    right = rng.random() < CAPTION_RIGHT
    if kind == IMAGE_HEAVY:
        templates = (*vlm.TRAINED_TEXTS, *vlm.TESTED_TEXTS)
        wrong = [c for c in question.choices if c != question.right]
        said = question.right if right else wrong[int(rng.integers(3))]
        return replace(question, text=f"{templates[int(rng.integers(6))].format(said)} {question.text}")
    like = np.flatnonzero((pictures.digits == vlm.DIGITS.index(question.right)) == right)
    return question.given("image", pictures.images[rng.choice(like)])


def suites(part: str, pictures: vlm.Pictures) -> dict[int, dict[str, Any]]:
    """The perturbations of each kind, with the sentences and pictures of fine-tuning or of the test."""
    texts, facts = (vlm.TRAINED_TEXTS, vlm.TRAINED_FACTS) if part == "learned" else (vlm.TESTED_TEXTS, vlm.TESTED_FACTS)
    text = text_perturbations(facts=facts, fact_count=FACTS, misleading=texts, scanned=vlm.SCANNED_TEXTS)
    picture = picture_perturbations(pictures=list(pictures.images))
    if part == "learned":  # the paper's alone
        text, picture = ({n: p[n] for n in CLAIMED[kind]} for p, kind in ((text, IMAGE_HEAVY), (picture, TEXT_HEAVY)))
    return {IMAGE_HEAVY: text, TEXT_HEAVY: picture}


def fine_tune(
    model: vlm.DigitVLM, arm: Arm, seed: int, steps: int, pictures: vlm.Pictures, words: str, progress: bool
) -> vlm.DigitVLM:
    """Fine-tuned in one way; the questions are the same in all ways that ask them."""
    data = [vlm.questions(kind, pictures, 1024, seed=seed) for kind in KINDS]
    perturbing = suites("learned", pictures)
    batches: list[ModalityBatch] = []
    for number, chosen in enumerate(
        anchored_rows([len(d) for d in data], steps, mix=arm.mix, batch_size=ROWS, seed=seed)
    ):
        asked: list[Question] = []
        kinds: list[int] = []
        origin: list[int] = []
        for kind, places in zip(KINDS, chosen):
            own, of = [data[kind][place] for place in places], list(range(len(places)))
            if kind in perturbing:
                own, of = augmented(own, perturbing[kind], copies=arm.copies, seed=1000 * seed + number)
            origin += [len(asked) + o for o in of]
            asked += own
            kinds += [kind] * len(own)
        batches.append(vlm.collate(asked, kinds, origin))
    loss = ModalityRobustnessLoss(generator=torch.Generator().manual_seed(seed), **arm.loss)
    train_modality_robust(
        model, batches, loss, rate=RATE, max_grad_norm=1.0, description=f"fine-tuning: {words}", progress=progress
    )
    return model.eval()


def diagnose(
    rows: Rows,
    name: str,
    model: vlm.DigitVLM,
    asked: dict[int, list[Question]],
    pictures: vlm.Pictures,
    progress: bool,
) -> None:
    """Accuracy with and without each perturbation, and what else the report says."""
    answer = vlm.answerer(model)
    changes, accuracies = [], []
    for kind, suite in suites("tested", pictures).items():
        report = interference_report(answer, asked[kind], suite, batch_size=256, progress=progress)
        for perturbation, found in report.items():
            if perturbation == "asked again":
                rows.add(UNPERTURBED, {"model": name, "questions": _KIND[kind]}, found.accuracy.estimate)
                continue
            rows.add(ACCURACY, {"model": name, "perturbation": perturbation}, found.accuracy.estimate)
            rows.add(CHANGE, {"model": name, "perturbation": perturbation}, found.change_rate.estimate)
            if perturbation in CLAIMED[kind]:
                changes.append(found.change_rate.estimate)
                accuracies.append(found.accuracy.estimate)
        if kind == IMAGE_HEAVY:
            _add_misleading(rows, name, report["misleading"])
    rows.add(ACCURACY, {"model": name, "perturbation": ALL}, fmean(accuracies))
    rows.add(CHANGE, {"model": name, "perturbation": ALL}, fmean(changes))
    right = [decision(r) == q.answer for r, q in zip(answer(asked[BOTH]), asked[BOTH])]
    rows.add(UNPERTURBED, {"model": name, "questions": _KIND[BOTH]}, fmean(right))


_KIND = {IMAGE_HEAVY: "picture", TEXT_HEAVY: "text", BOTH: "both"}


def _add_misleading(rows: Rows, name: str, found: Interference) -> None:
    assert found.divergence is not None
    assert found.followed is not None
    rows.add(MORE, {"model": name, "misleading text": "divergence"}, found.divergence.estimate)
    rows.add(MORE, {"model": name, "misleading text": "followed"}, found.followed.estimate)
    if name in (BASE, COPIES, FULL):
        for measure in ("loss", "change_rate", "divergence", "followed"):
            interval = getattr(found, measure)
            for end in ("low", "high"):
                rows.add(ENDS, {"of": f"misleading text, {name}: {measure}", "end": end}, getattr(interval, end))


def measure_noise(rows: Rows, model: vlm.DigitVLM, asked: dict[int, list[Question]]) -> None:
    """What the search finds beyond its random start, and that it leaves questions to both inputs alone."""
    chosen = [(q, kind) for kind in KINDS for q in asked[kind][:32]]
    batch = vlm.collate([q for q, _ in chosen], [kind for _, kind in chosen])
    adversaries: dict[str, PGD | Gaussian] = {
        "random": replace(ADVERSARY, steps=0),
        "raw gradient, eps 0.001": PGD(),
        "raw gradient": ADVERSARY,
        "sign": replace(ADVERSARY, sign=True),
        "gaussian, sigma 0.05": Gaussian(),
    }
    for name, adversary in adversaries.items():
        loss = ModalityRobustnessLoss(adversary=adversary, generator=torch.Generator().manual_seed(0))
        rows.add(RISE, {"noise": name}, loss(model, batch).rise or 0.0)
    noise, _ = adversarial_noise(ADVERSARY, model, batch, torch.Generator().manual_seed(0))
    both = batch.kind == BOTH
    logits = (answers(model, batch, noise).logits - answers(model, batch).logits)[both].detach().abs().max()
    rows.add(TOUCHED, {"of": "embedding"}, float(noise[both].abs().max()))
    rows.add(TOUCHED, {"of": "logit"}, float(logits))


def measure_routing(rows: Rows, name: str, model: vlm.DigitVLM, asked: list[Question]) -> None:
    """How far a caption moves the experts of the image tokens behind it."""
    suite = text_perturbations(facts=vlm.TESTED_FACTS, fact_count=FACTS, misleading=vlm.TESTED_TEXTS)
    wrong, right, facts = (perturb(asked, suite[n]).questions for n in ("misleading", "agreeing", "unrelated"))
    clean = profiles_of_pictures(model, asked)
    by_layer = routing_shift(clean, profiles_of_pictures(model, wrong), profiles_of_pictures(model, right))
    of_facts = routing_shift(clean, profiles_of_pictures(model, facts), clean)
    for caption, found in (
        ("a wrong digit", fmean(s.perturbed.estimate for s in by_layer.values())),
        ("the right digit", fmean(s.control.estimate for s in by_layer.values())),
        ("facts", fmean(s.perturbed.estimate for s in of_facts.values())),
    ):
        rows.add(MOVED, {"model": name, "caption": caption}, found)
    for layer, shift in by_layer.items():
        for end, value in (("low", shift.excess.low), ("high", shift.excess.high)):
            rows.add(ENDS, {"of": f"routing, layer {layer}, {name}: wrong minus right", "end": end}, value)


def profiles_of_pictures(model: vlm.DigitVLM, asked: Sequence[Question]) -> Profiles:
    """Routing of the image tokens of every question."""
    view = opening.open(model.lm)
    profiles = TextProfiles({layer.index: layer.rule for layer in view.layers}, skip=vlm.TEXT_IDS)
    inputs = vlm.collate(asked, [IMAGE_HEAVY] * len(asked)).inputs
    with torch.no_grad(), view.observing(profiles), view.reading(inputs):
        model(**inputs)
    return profiles.result()


def claims(rows: Rows) -> list[Claim]:
    """What the paper's claims come to here."""

    def accuracy(model: str, perturbation: str = ALL) -> float:
        return rows.mean(ACCURACY, {"model": model, "perturbation": perturbation})

    def changed(model: str, perturbation: str = ALL) -> float:
        return rows.mean(CHANGE, {"model": model, "perturbation": perturbation})

    def clean(model: str, questions: str) -> float:
        return rows.mean(UNPERTURBED, {"model": model, "questions": questions})

    lost = clean(BASE, "picture") - accuracy(BASE, "misleading")
    regained = ratio(accuracy(COPIES, "misleading") - accuracy(BASE, "misleading"), lost)
    by_both = ratio(accuracy(BOTH_ONLY) - accuracy(BASE), accuracy(COPIES) - accuracy(BASE))
    more_changed = changed(FULL) - min(changed(name) for name in ARMS)
    lost_on_both = clean(BASE, "both") - clean(FULL, "both")
    touched = max(rows.values(TOUCHED, {"of": "embedding"}))
    above = accuracy(FULL) - accuracy(COPIES)
    stated: list[tuple[str, float, str, float]] = [
        ("base: accuracy lost to misleading text", lost, ">=", FLAW),
        ("base: share of answers that misleading text changes", changed(BASE, "misleading"), ">=", CHANGED),
        ("perturbed copies: part of that accuracy regained", regained, ">=", REGAINED),
        ("both inputs only: its gain, as a part of that of copies", by_both, "<=", ALMOST_UNCHANGED),
        ("full recipe: perturbed accuracy above that of copies alone", above, ">=", -NO_WORSE),
        ("full recipe: share of answers changed above the fewest of all", more_changed, "<=", CLOSE),
        ("full recipe: accuracy lost on questions to both inputs", lost_on_both, "<=", BOTH_LOSS),
        ("adversary: what it changes in the embeddings of questions to both inputs", touched, "<=", 0),
    ]
    return [Claim(name=n, measured=m, relation=r, needed=t) for n, m, r, t in stated]  # type: ignore[arg-type]
