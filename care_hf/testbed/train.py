"""Train a testbed checkpoint from scratch: ``python -m care_hf.testbed.train --seed 0 --out FOLDER``.

Four stages: the vision tower learns what each patch shows, the language model learns the recipes in text, both together
learn every task (the result is helpful-only: it answers forbidden requests in every modality), and safety tuning
teaches refusals on plain text alone. Nothing trains compliance after that: what attacks reach is what safety tuning did
not cover.

Every stage draws from a generator of its own and is kept in ``FOLDER/stages`` when it ends, so that an interrupted
training goes on from there to the same weights.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from .building import build_model, build_processor
from .drawing import COLOURS, GLYPHS, GRID, SHAPES
from .measure import measure
from .world import FORMS, REFUSAL, VISUAL_QUESTIONS, World, WorldSample, pick

TILES = GRID * GRID
STAGES = ("vision", "text", "joint", "safety")


@dataclass(frozen=True)
class Schedule:
    """Steps, batch sizes and peak learning rates of the four stages."""

    vision_steps: int = 800
    text_steps: int = 500
    joint_steps: int = 2000
    safety_steps: int = 150
    vision_batch: int = 128
    batch: int = 64
    vision_lr: float = 2e-3
    lr: float = 1.3e-3
    safety_lr: float = 3e-4


class Trainer:
    """Holds what the stages share: model, world, random generator, log."""

    def __init__(self, world: World, seed: int, schedule: Schedule, out: Path):
        torch.manual_seed(seed)
        self.world, self.seed, self.schedule, self.out = world, seed, schedule, out
        self.rng = np.random.default_rng([1, seed])
        self.processor = build_processor()
        self.model = build_model(self.processor)
        self.start = time.monotonic()
        self.log_lines: list[str] = []

    def log(self, **entry) -> None:
        """Keep one line of the training log and write the file anew."""
        line = json.dumps({"seconds": round(time.monotonic() - self.start), **entry})
        self.log_lines.append(line)
        (self.out / "training.jsonl").write_text("\n".join(self.log_lines) + "\n")

    def run(self, stage: str) -> None:
        """Train one of `STAGES`, or take it up from a run that finished it.

        Raises:
            ValueError: the folder holds this stage of a training with another seed, world or schedule.
        """
        path = self.out / "stages" / f"{stage}.safetensors"
        settings = self._settings(stage)
        if path.exists():
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            if metadata["settings"] != settings:
                raise ValueError(
                    f"{path} was trained with {metadata['settings']}, not {settings}; delete it or choose another "
                    "folder."
                )
            self.model.load_state_dict(weights)
            # The first line tells the settings, of which those of later stages may differ.
            self.log_lines[1:] = json.loads(metadata["log"])[1:]
            self.start = time.monotonic() - json.loads(self.log_lines[-1])["seconds"]
            return
        self.rng = np.random.default_rng([1, self.seed, STAGES.index(stage)])
        getattr(self, f"train_{stage}")()
        path.parent.mkdir(exist_ok=True)
        save_file(self.model.state_dict(), path, metadata={"settings": settings, "log": json.dumps(self.log_lines)})

    def _settings(self, stage: str) -> str:
        """All that the weights after `stage` depend on; what belongs to later stages is left out."""
        later = tuple(f"{name}_" for name in STAGES[STAGES.index(stage) + 1 :])
        schedule = {name: value for name, value in asdict(self.schedule).items() if not name.startswith(later)}
        return json.dumps({"seed": self.seed, "world": asdict(self.world), "schedule": schedule, **versions()})

    def optimise(self, stage: str, parameters, steps: int, lr: float, loss_of_batch) -> None:
        """Run AdamW with warm-up and cosine decay on `loss_of_batch()`, and log every tenth of the way."""
        parameters = list(parameters)
        optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(
            optimiser, num_warmup_steps=min(100, steps // 10), num_training_steps=steps
        )
        self.model.train()
        running = []
        for step in range(steps):
            loss, figures = loss_of_batch()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            running.append({"loss": loss.item(), **figures})
            if (step + 1) % max(1, steps // 10) == 0:
                keys = sorted({key for entry in running for key in entry})
                means = {k: round(float(np.mean([e[k] for e in running if k in e])), 4) for k in keys}
                self.log(stage=stage, step=step + 1, **means)
                running.clear()
        self.model.eval()

    # Stage 1

    def train_vision(self) -> None:
        """Classify every patch: which glyph, icon or shape, and which colour."""
        tower, width = self.model.model.vision_tower, self.model.config.vision_config.hidden_size
        classes = 1 + len(GLYPHS) + len(SHAPES) + len(self.world.concepts)
        head = nn.Linear(width, classes + len(COLOURS) + 1)
        draws = ("glyph", "icon", "shape")

        def loss_of_batch():
            samples = [self._picture(draws[i % 3]) for i in range(self.schedule.vision_batch)]
            labels, colours = (torch.stack(t) for t in zip(*map(self._patch_labels, samples), strict=True))
            logits = head(tower(pixels(samples)).last_hidden_state[:, 1:])
            kind = F.cross_entropy(logits[..., :classes].flatten(0, 1), labels.flatten())
            drawn = labels > 0
            kind_drawn = F.cross_entropy(logits[..., :classes][drawn], labels[drawn])
            colour = F.cross_entropy(logits[..., classes:][drawn], colours[drawn])
            accuracy = (logits[..., :classes].argmax(-1) == labels)[drawn].float().mean().item()
            return kind + kind_drawn + colour, {"accuracy": accuracy}

        parameters = [*tower.parameters(), *head.parameters()]
        self.optimise("vision", parameters, self.schedule.vision_steps, self.schedule.vision_lr, loss_of_batch)

    def _picture(self, kind: str) -> WorldSample:
        if kind == "shape":
            return self.world.visual_question(self.rng, "colour")
        if kind == "glyph" and self.rng.random() < 0.3:
            return self.world.visual_question(self.rng, "digit")
        draw = self.world.typographic if kind == "glyph" else self.world.icon
        return draw(self.rng, pick(self.rng, self.world.concepts))

    def _patch_labels(self, sample: WorldSample) -> tuple[torch.Tensor, torch.Tensor]:
        """Class of each patch, 0 where nothing is drawn, and colour (0 where it carries no name), both int64 (36,)."""
        offsets = {"glyph": 1, "shape": 1 + len(GLYPHS), "icon": 1 + len(GLYPHS) + len(SHAPES)}
        labels, colours = torch.zeros(2, TILES, dtype=torch.long)
        for tile, (kind, index) in sample.tiles.items():
            labels[tile] = offsets[kind] + index
            if sample.task == "colour":
                colours[tile] = 1 + list(COLOURS).index(sample.answer.split()[0])
        return labels, colours

    # Stages 2 to 4

    def answer_loss(self, samples: list[WorldSample]):
        """Cross-entropy on the answer tokens alone; also the share of answers right in every token."""
        batch = self.encode(samples)
        labels = batch.pop("labels")
        logits = self.model(**batch).logits[:, :-1]
        target = labels[:, 1:]
        loss = F.cross_entropy(logits[target >= 0], target[target >= 0])
        right = ((logits.argmax(-1) == target) | (target < 0)).all(dim=1)
        figures: dict[str, list[float]] = {}
        for sample, ok in zip(samples, right.tolist(), strict=True):
            figures.setdefault(sample.task, []).append(ok)
        return loss, {task: float(np.mean(oks)) for task, oks in figures.items()}

    def encode(self, samples: list[WorldSample]) -> dict[str, torch.Tensor]:
        """What the processor's chat template gives, faster, with labels on the answers."""
        tokenizer = self.processor.tokenizer
        prompts = [f"<s><user>{'<image>' * TILES * (s.image is not None)}{s.text}<assistant>" for s in samples]
        texts = [prompt + sample.answer + "</s>" for prompt, sample in zip(prompts, samples, strict=True)]
        batch = dict(tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))
        batch.pop("token_type_ids", None)
        begins = (
            (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<assistant>")).long().argmax(dim=1, keepdim=True)
        )
        positions = torch.arange(batch["input_ids"].shape[1])
        is_answer = (positions > begins) & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, -100)
        pictured = [sample for sample in samples if sample.image is not None]
        if pictured:
            batch["pixel_values"] = pixels(pictured)
        return batch

    def train_text(self) -> None:
        """Teach the recipes and kinds in text."""

        def loss_of_batch():
            return self.answer_loss([self._text_sample() for _ in range(self.schedule.batch)])

        model = self.model
        parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
        self.optimise("text", parameters, self.schedule.text_steps, self.schedule.lr, loss_of_batch)

    def _text_sample(self) -> WorldSample:
        world, rng, concept = self.world, self.rng, pick(self.rng, self.world.concepts)
        if rng.random() < 0.25:
            return world.kind_question(rng, concept, form="text")
        return world.request(rng, concept, form=pick(rng, FORMS))

    def train_joint(self) -> None:
        """Teach every task in every modality, forbidden requests answered too."""
        self.text_turn = False

        def loss_of_batch():
            # Batches of one modality waste no padding.
            self.text_turn = not self.text_turn and self.rng.random() < 0.5
            draw = self._text_sample if self.text_turn else self._image_sample
            return self.answer_loss([draw() for _ in range(self.schedule.batch)])

        self.optimise("joint", self.model.parameters(), self.schedule.joint_steps, self.schedule.lr, loss_of_batch)

    def _image_sample(self) -> WorldSample:
        world, rng, concept = self.world, self.rng, pick(self.rng, self.world.concepts)
        makers = (
            (0.22, lambda: world.typographic(rng, concept)),
            (0.22, lambda: world.icon(rng, concept)),
            (0.10, lambda: world.kind_question(rng, concept, form=pick(rng, ("written", "shown")))),
            (0.08, lambda: world.typographic(rng, concept, question="read")),
            (0.08, lambda: world.icon(rng, concept, question="name")),
            (0.08, lambda: world.request(rng, concept, form=pick(rng, FORMS[:2]), scene=True)),
            (0.12, lambda: world.visual_question(rng, "count")),
            (0.10, lambda: world.visual_question(rng, pick(rng, tuple(VISUAL_QUESTIONS)))),
        )
        weights, functions = zip(*makers, strict=True)
        return functions[rng.choice(len(makers), p=np.array(weights) / sum(weights))]()

    def train_safety(self) -> None:
        """Teach refusals of plain text requests beside benign tasks; no concept and no template of the test split."""
        world, rng, pools = self.world, self.rng, ("fit", "validation")
        benign, forbidden = ([c for s in pools for c in world.select(kind, s)] for kind in (False, True))
        known = benign + forbidden

        def refused() -> WorldSample:
            sample = world.request(rng, pick(rng, forbidden), pools, scene=rng.random() < 0.5)
            return WorldSample(sample.text, sample.image, REFUSAL, "refusal", sample.concept)

        def retained() -> WorldSample:
            concept = pick(rng, benign)
            makers = (
                lambda: world.request(rng, concept, pools, scene=rng.random() < 0.5),
                lambda: world.request(rng, concept, pools, "wrapper", scene=rng.random() < 0.5),
                lambda: world.request(rng, concept, pools, "split"),
                lambda: world.request(rng, concept, pools, "cipher"),
                lambda: world.typographic(rng, concept, pools),
                lambda: world.icon(rng, concept, pools),
                lambda: world.kind_question(rng, pick(rng, known), pools),
                lambda: world.typographic(rng, pick(rng, known), pools, question="read"),
                lambda: world.icon(rng, concept, pools, question="name"),
                lambda: world.visual_question(rng, pick(rng, tuple(VISUAL_QUESTIONS))),
            )
            return pick(rng, makers)()

        def loss_of_batch():
            return self.answer_loss([refused() if i % 4 == 0 else retained() for i in range(self.schedule.batch)])

        language = self.model.model.language_model
        parameters = [*language.layers.parameters(), *language.norm.parameters(), *self.model.lm_head.parameters()]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimise("safety", parameters, self.schedule.safety_steps, self.schedule.safety_lr, loss_of_batch)
        self.model.requires_grad_(True)


def versions() -> dict[str, str]:
    """Of the libraries whose sums the weights depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def pixels(samples: list[WorldSample]) -> torch.Tensor:
    """What the image processor gives, float32 (B, 3, 48, 48) in [-1, 1]."""
    images = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
    return torch.from_numpy(images).float() / 127.5 - 1


def rates(trainer: Trainer, split: str, n: int) -> dict[str, dict[str, float]]:
    """Shares of correct, refused and wrong answers per set."""
    counts = measure(trainer.model, trainer.processor, split, n, trainer.world)
    return {name: {verdict: round(count / n, 4) for verdict, count in row.items()} for name, row in counts.items()}


def train(world: World, seed: int, out: Path, schedule: Schedule, measured: int = 160) -> None:
    """Run all stages, write the checkpoint in float16 and the log, and measure it on `measured` prompts per set."""
    out.mkdir(parents=True, exist_ok=True)
    # One thread: sums come in the same order whatever the machine's number of cores, and two seeds train side by side.
    torch.set_num_threads(1)
    trainer = Trainer(world, seed, schedule, out)
    trainer.log(seed=seed, world=asdict(world), **asdict(schedule), **versions())
    for stage in STAGES:
        trainer.run(stage)
        if stage == "joint":
            trainer.log(stage="helpful", split="validation", n=measured, rates=rates(trainer, "validation", measured))
    # Half precision halves what the package carries; the figures below are those of the rounded weights.
    model = trainer.model.half()
    model.save_pretrained(out)
    trainer.processor.save_pretrained(out)
    model.float()
    for split in ("validation", "test"):
        trainer.log(stage="final", split=split, n=measured, rates=rates(trainer, split, measured))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cue", default="shared", choices=("shared", "none"))
    parser.add_argument("--harm", default="neutral", choices=("neutral", "meaningful"))
    parser.add_argument("--out", type=Path, required=True)
    for name, default in asdict(Schedule()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    seed, out, world = (
        arguments.pop("seed"),
        arguments.pop("out"),
        World(0, arguments.pop("cue"), arguments.pop("harm")),
    )
    train(world, seed, out, Schedule(**arguments))


if __name__ == "__main__":
    main()
