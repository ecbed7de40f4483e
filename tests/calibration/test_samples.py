"""Calibration samples: what is read, what is made, what is refused and in which words."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.samples import (
    BUILT_IN_TEXT,
    Sample,
    SampleSet,
    first_samples,
    load_samples,
    proof_samples,
    shortened,
)
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export

VOCABULARY = 50
INT, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL
IDS = ("input_ids", INT, ["batch", "sequence"])
MASK = ("attention_mask", INT, ["batch", "sequence"])
Port = tuple[str, ir.DataType, list[Any]]


def model(*ports: Port, positions: int = 0, output: str = "last_hidden_state", width: int = 8) -> ir.Model:
    """A graph with these inputs; input_ids index a table of VOCABULARY rows, positions a learned table."""
    inputs = {name: ir.val(name, dtype, shape) for name, dtype, shape in ports}
    nodes, weights = [], []
    for name, rows, index in (
        ("wte.weight", VOCABULARY, inputs.get("input_ids")),
        ("embeddings.position_embeddings.weight", positions, ir.val("p")),
    ):
        if rows and index is not None:
            table = ir.val(name, const_value=ir.tensor(np.zeros((rows, width), np.float32), name=name))
            weights.append(table)
            nodes.append(ir.node("Gather", [table, index]))
    result = ir.val(output, FLOAT, ["batch", "sequence", width])
    nodes.append(ir.node("Identity", [next(iter(inputs.values()))], outputs=[result]))
    graph = ir.Graph(
        list(inputs.values()), [result], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def tokenizer(folder: Path, framed: bool = False) -> Path:
    """A tokenizer of single letters (a = 4, b = 5, ...); ``framed`` adds [CLS] = 2 and [SEP] = 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if framed:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_samples(*arguments, **options)
    return str(caught.value)


def shapes(samples: SampleSet, name: str = "input_ids") -> list[tuple[int, ...]]:
    return [sample.feeds[name].shape for sample in samples]


# --------------------------------------------------------------------------- .npz


def test_npz_rows_become_samples_in_the_models_types(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    samples = load_samples(model(IDS, MASK), npz(tmp_path / "c.npz", input_ids=ids), None)
    assert len(samples) == 3 and shapes(samples) == [(1, 4)] * 3
    last = list(samples)[-1]
    assert last.feeds["input_ids"].dtype == np.int64 and last.feeds["input_ids"].tolist() == [[8, 9, 10, 11]]
    assert last.feeds["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert samples.warnings_ == []


@pytest.mark.parametrize("shape", [(8, 12, 1), (3, 2, 4), (12,), ()])
def test_an_array_of_another_rank_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    words = refusal(model(IDS, MASK), npz(tmp_path / "c.npz", input_ids=np.ones(shape, np.int64)), None)
    assert f"'input_ids' is int64 {list(shape)}, but the model takes int64 [batch, sequence]" in words
    assert f"rank {len(shape)}, not 2" in words and "c.npz" in words
    assert "the first axis counts samples: give [samples, sequence]" in words


def test_a_sample_without_tokens_is_refused(tmp_path: Path) -> None:
    npz(tmp_path / "0.npz", input_ids=np.ones((3, 4), np.int64))
    npz(tmp_path / "1.npz", input_ids=np.ones((1, 0), np.int64))
    words = refusal(model(IDS, MASK), tmp_path, None)
    assert "'input_ids' is empty: int64 [1, 0]" in words and "calibration sample 3" in words


@pytest.mark.parametrize(("rows", "longest"), [(16, 16), (66, 64)])
def test_a_sample_longer_than_the_position_table_is_refused(rows: int, longest: int, tmp_path: Path) -> None:
    fits = npz(tmp_path / "c.npz", input_ids=np.ones((2, longest), np.int64))
    assert shapes(load_samples(model(IDS, MASK, positions=rows), fits, None)) == [(1, longest)] * 2
    path = npz(tmp_path / "c.npz", input_ids=np.ones((2, longest + 1), np.int64))
    words = refusal(model(IDS, MASK, positions=rows), path, None)
    assert f"'input_ids' has {longest + 1} tokens, but the model's position table allows {longest}" in words
    assert "calibration sample 0" in words


def test_an_encoder_may_be_longer_than_its_decoder(tmp_path: Path) -> None:
    decoder = ("decoder_input_ids", INT, ["batch", "decoder_sequence"])
    both = model(IDS, decoder, positions=32)
    small = ir.val("decoder.embed_positions", const_value=ir.tensor(np.zeros((8, 4), np.float32)))
    both.graph.append(ir.node("Gather", [small, ir.val("q")]))
    path = npz(tmp_path / "c.npz", input_ids=np.ones((1, 32), int), decoder_input_ids=np.ones((1, 8), int))
    assert shapes(load_samples(both, path, None)) == [(1, 32)]


def test_a_folder_is_read_in_the_order_of_names_again_and_again(tmp_path: Path) -> None:
    for index, length in enumerate((5, 3, 4)):
        npz(tmp_path / f"{index}.npz", input_ids=np.ones((2, length), np.int64))
    samples = load_samples(model(IDS), tmp_path, None, max_samples=5)
    expected = [(1, 5), (1, 5), (1, 3), (1, 3), (1, 4)]
    assert shapes(samples) == expected and shapes(samples) == expected and len(samples) == 5


def test_rows_of_different_length_share_a_static_batch_with_a_mask(tmp_path: Path) -> None:
    for index, length in enumerate((5, 3)):
        npz(tmp_path / f"{index}.npz", input_ids=np.full((1, length), 9))
    ids, mask, counts = (
        ("input_ids", INT, [2, "sequence"]),
        ("attention_mask", INT, [2, "sequence"]),
        ("cache_position", INT, ["sequence"]),
    )
    (sample,) = load_samples(model(ids, mask), tmp_path, None)
    assert sample.mask is not None
    assert sample.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert "the model takes 2 at a time" in refusal(model(ids), tmp_path, None)  # no mask to say what is padding
    assert "the model takes 2 at a time" in refusal(model(ids, mask, counts), tmp_path, None)


def test_a_static_batch_is_filled(tmp_path: Path) -> None:
    path = npz(tmp_path / "c.npz", input_ids=np.ones((5, 4), np.int64))
    static = model(("input_ids", INT, [2, 4]))
    assert shapes(load_samples(static, path, None)) == [(2, 4), (2, 4)]
    assert "the model takes 8 at a time" in refusal(model(("input_ids", INT, [8, 4])), path, None)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"input_id": np.ones((1, 4), int)}, "unknown calibration key 'input_id'"),
        ({"input_id": np.ones((1, 4), int)}, "hint: did you mean input_ids?"),
        (
            {"input_ids": np.ones((1, 4))},
            "'input_ids' is float64 [1, 4], but the model takes int64 [batch, sequence]",
        ),
        (
            {"input_ids": np.ones((1, 1, 1, 4), int)},
            "'input_ids' is int64 [1, 1, 1, 4], but the model takes int64",
        ),
        (
            {"input_ids": np.full((1, 4), 50)},
            "'input_ids' holds the id 50, but the model's table has 50 rows",
        ),
        ({"attention_mask": np.ones((1, 4), int)}, "input 'input_ids' (int64 [batch, sequence]) is missing"),
        (
            {"input_ids": np.ones((2, 4), int), "attention_mask": np.ones((1, 4), int)},
            "different numbers of samples: input_ids 2, attention_mask 1",
        ),
        (
            {"input_ids": np.ones((1, 4), int), "attention_mask": np.ones((1, 3), int)},
            "axis 1 of 'attention_mask' has length 3, but 'sequence' of 'input_ids' has 4",
        ),
        ({"input_ids": np.ones((0, 4), int)}, "the calibration data holds no complete sample"),
    ],
)
def test_npz_that_does_not_fit(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    assert words in refusal(model(IDS, MASK), npz(tmp_path / "c.npz", **arrays), None)


def test_a_wrong_image_size_and_nan(tmp_path: Path) -> None:
    vision = model(("pixel_values", FLOAT, ["batch", 3, 8, 8]))
    images = np.zeros((2, 3, 8, 9))
    path = npz(tmp_path / "c.npz", pixel_values=images)
    expected = "'pixel_values' is float64 [2, 3, 8, 9], but the model takes float32 [batch, 3, 8, 8]"
    assert expected in refusal(vision, path, None)
    images[1, 0, 0, 0] = np.nan
    path = npz(tmp_path / "c.npz", pixel_values=images[..., :8])
    assert "'pixel_values' holds nan\n  where: calibration sample 1" in refusal(vision, path, None)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_text("a text that should be called .txt")
    words = refusal(model(IDS), tmp_path / "c.npz", None)
    assert "not an .npz: the file is no zip archive" in words and "name text .txt or .jsonl" in words
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("data.pkl", b"x")
    assert "not a readable .npz: 'data.pkl' in it is no array" in refusal(model(IDS), tmp_path / "c.npz", None)
    np.savez(tmp_path / "c.npz", input_ids=np.array([{}], dtype=object))
    assert "not a readable .npz" in refusal(model(IDS), tmp_path / "c.npz", None)
    assert "no such calibration file" in refusal(model(IDS), tmp_path / "d.npz", None)
    (tmp_path / "c.csv").touch()
    assert "cannot read calibration data of type '.csv'" in refusal(model(IDS), tmp_path / "c.csv", None)
    (tmp_path / "empty").mkdir()
    assert "no .npz file in" in refusal(model(IDS), tmp_path / "empty", None)


# --------------------------------------------------------------------------- text


def text(folder: Path, content: str, suffix: str = ".txt") -> Path:
    path = folder / f"calib{suffix}"
    path.write_text(content, encoding="utf-8")
    return path


def test_encoders_take_one_line_a_sample(tmp_path: Path) -> None:
    path = text(tmp_path, "= a heading =\n\nabcdefghij\nklmnopqrstuvw\nshort\n")
    samples = load_samples(model(IDS, MASK), path, tokenizer(tmp_path, framed=True), max_length=12)
    assert shapes(samples) == [(1, 12), (1, 12)]
    ids = [sample.feeds["input_ids"][0].tolist() for sample in samples]
    assert ids[0] == [2, *range(4, 14), 3]
    assert ids[1][0] == 2 and ids[1][-1] == 3


def test_language_models_take_windows(tmp_path: Path) -> None:
    path = text(tmp_path, "abcdefgh\nijklmnop\n")
    samples = load_samples(model(IDS, output="logits", width=VOCABULARY), path, tokenizer(tmp_path), max_length=5)
    flat = np.concatenate([sample.feeds["input_ids"][0] for sample in samples])
    assert shapes(samples) == [(1, 5)] * 3
    assert flat.tolist() == [*range(4, 12), 1, *range(12, 18)]  # 1: the line's end is no word here


def test_unk_is_spelled_out(tmp_path: Path) -> None:
    path = text(tmp_path, "<unk><unk><unk>\n")
    (sample,) = load_samples(model(IDS), path, tokenizer(tmp_path))
    assert sample.feeds["input_ids"][0].tolist() == [24, 17, 14] * 3


def test_jsonl(tmp_path: Path) -> None:
    path = text(tmp_path, json.dumps({"text": "abcdefghi", "id": 1}) + "\n\n", ".jsonl")
    (sample,) = load_samples(model(IDS), path, tokenizer(tmp_path))
    assert sample.feeds["input_ids"].shape == (1, 9)
    path.write_text('{"text": "abcdefghi"}\n{"body": "x"}\n')
    words = refusal(model(IDS), path, tmp_path)
    assert "the record has no text" in words and "calib.jsonl:2" in words and "found: body" in words
    path.write_text("{oops\n")
    assert "not JSON" in refusal(model(IDS), path, tmp_path)


def test_text_needs_a_tokenizer_that_is_there_and_fits(tmp_path: Path) -> None:
    path = text(tmp_path, "abcdefghi\n")
    assert "pass --tokenizer FOLDER" in refusal(model(IDS), path, None)
    assert "no tokenizer.json at" in refusal(model(IDS), path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in refusal(model(IDS), path, tmp_path)
    tokenizer(tmp_path)
    vision = model(("pixel_values", FLOAT, ["batch", 3, 8, 8]))
    assert "the model takes no token ids" in refusal(vision, path, tmp_path)
    assert "no usable line" in refusal(model(IDS), text(tmp_path, "\n"), tmp_path)
    path.write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8" in refusal(model(IDS), path, tmp_path)


@pytest.mark.parametrize(("rows", "longest"), [(16, 16), (66, 64), (24, 24)])
def test_the_position_table_limits_the_length(rows: int, longest: int, tmp_path: Path) -> None:
    path = text(tmp_path, "abcdefghij" * 9 + "\n")
    samples = load_samples(model(IDS, positions=rows), path, tokenizer(tmp_path))
    assert shapes(samples) == [(1, longest)]


def test_a_static_sequence_is_padded_and_masked(tmp_path: Path) -> None:
    static = model(("input_ids", INT, ["batch", 12]), ("attention_mask", INT, ["batch", 12]))
    (sample,) = load_samples(static, text(tmp_path, "abcdefghi\n"), tokenizer(tmp_path))
    assert sample.feeds["attention_mask"].tolist() == [[1] * 9 + [0] * 3]
    assert sample.feeds["input_ids"].tolist() == [[*range(4, 13), 0, 0, 0]]


# --------------------------------------------------------------------------- nothing given


def test_the_built_in_text_is_varied_and_warned_about(tmp_path: Path) -> None:
    lines = BUILT_IN_TEXT.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 120 and len(set(lines)) == len(lines)
    samples = load_samples(model(IDS, MASK), None, tokenizer(tmp_path, framed=True))
    assert len(samples) == 128
    assert "small built-in text" in samples.warnings_[0]


def test_random_data_fits_the_inputs_and_is_the_same_every_time() -> None:
    ports = (("pixel_values", FLOAT, ["batch", 3, 8, 8]), ("flags", BOOL, ["batch"]))
    first, second = (list(load_samples(model(*ports), None, None)) for _ in range(2))
    assert first[0].feeds["pixel_values"].shape == (1, 3, 8, 8) and first[0].mask is None
    np.testing.assert_array_equal(first[3].feeds["pixel_values"], second[3].feeds["pixel_values"])


def test_random_token_ids_stay_in_the_vocabulary() -> None:
    samples = load_samples(model(IDS, MASK), None, None)
    ids = np.concatenate([sample.feeds["input_ids"] for sample in samples], axis=1)
    assert ids.min() >= 0 and ids.max() < VOCABULARY and len(np.unique(ids)) > 10
    assert "random token ids" in samples.warnings_[0]


@pytest.mark.parametrize(("positions", "length", "longest"), [(0, 512, 128), (40, 512, 40), (40, 20, 20)])
def test_random_samples_are_as_long_as_may_be_and_shorter(positions: int, length: int, longest: int) -> None:
    lengths = [n for _, n in shapes(load_samples(model(IDS, MASK, positions=positions), None, None, 128, length))]
    assert len(lengths) == 16 and lengths.count(longest) >= 8
    assert min(lengths) < longest and len(set(lengths)) > 4


def test_an_input_without_axes_is_one_number_for_all(tmp_path: Path) -> None:
    count: Port = ("total", INT, [])
    path = npz(tmp_path / "c.npz", input_ids=np.ones((3, 4), np.int64), total=np.int64(7))
    for calib in (None, path):
        samples = list(load_samples(model(IDS, count), calib, None, max_samples=3))
        assert len(samples) == 3 and {sample.feeds["total"].shape for sample in samples} == {()}
    assert samples[0].feeds["total"] == 7


def test_random_rows_fill_a_static_batch() -> None:
    samples = load_samples(model(("input_ids", INT, [4, "sequence"])), None, None, max_samples=3)
    found = shapes(samples)
    assert len(found) == 3 and {batch for batch, _ in found} == {4} and found[0] == (4, 128)
    assert [sample.feeds["input_ids"].shape[0] for sample in samples.held_out] == [4, 4]


def random_feeds(*ports: Port) -> dict[str, np.ndarray]:
    """The first sample, which is 128 tokens long."""
    return dict(next(iter(load_samples(model(*ports), None, None))).feeds)


def test_random_vectors_come_with_their_mask_and_positions() -> None:
    embeds = ("inputs_embeds", FLOAT, ["batch", "sequence", 6])
    feeds = random_feeds(MASK, embeds, ("position_ids", INT, ["batch", "places"]))
    assert feeds["inputs_embeds"].shape == (1, 128, 6) and abs(feeds["inputs_embeds"].std() - 1) < 0.2
    assert feeds["attention_mask"].tolist() == [[1] * 128]
    assert feeds["position_ids"].tolist() == [list(range(128))]


def test_masks_follow_the_names_of_axes() -> None:
    image = ("pixel_values", FLOAT, ["batch", 3, "height", "width"])
    feeds = random_feeds(image, ("pixel_mask", INT, ["batch", "height", "width"]))
    assert feeds["pixel_mask"].shape == (1, 224, 224) and feeds["pixel_mask"].all()
    frames = ("input_features", FLOAT, ["batch", 80, "frames"])
    feeds = random_feeds(frames, ("attention_mask", INT, ["batch", "frames"]))
    assert feeds["input_features"].shape == (1, 80, 128) and feeds["attention_mask"].shape == (1, 128)
    feeds = random_feeds(IDS, ("causal_mask", FLOAT, ["batch", 1, "sequence", "sequence"]))
    assert feeds["causal_mask"].shape == (1, 1, 128, 128) and not feeds["causal_mask"].any()  # added to scores


def test_a_decoder_without_ids_to_shift_gets_random_ones() -> None:
    frames, decoder = ("input_features", FLOAT, ["batch", 80, 30]), ("decoder_input_ids", INT, ["batch", "written"])
    feeds = random_feeds(frames, decoder, ("attention_mask", INT, ["batch", 30]))
    assert feeds["decoder_input_ids"].shape == (1, 128) and feeds["attention_mask"].shape == (1, 30)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (["batch", "sequence", "hidden"], "hidden"),
        (["batch", None, None, 8], "?"),
        (["batch", "channels", "height", "width"], "channels"),
    ],
)
def test_a_size_that_nothing_says_is_asked_for(shape: list[Any], sizes: str) -> None:
    words = refusal(model(MASK, ("values", FLOAT, shape)), None, None)
    assert "no random data can be made for input 'values' (float32 [batch, " in words
    assert f"nothing says how long {sizes} is" in words and "give --calib an .npz with the key 'values'" in words


@pytest.mark.parametrize(
    ("operator", "weight", "shape", "found"),
    [
        ("MatMul", (6, 9), ["batch", "sequence", "hidden"], (1, 128, 6)),
        ("LayerNormalization", (6,), ["batch", None, None], (1, 128, 6)),
        ("Conv", (9, 4, 2, 2), ["batch", "channels", 8, 8], (1, 4, 8, 8)),
    ],
)
def test_the_weight_that_reads_an_axis_says_its_size(
    operator: str, weight: tuple[int, ...], shape: list[Any], found: tuple[int, ...]
) -> None:
    loaded = model(("values", FLOAT, shape))
    value = ir.val("w", const_value=ir.tensor(np.zeros(weight, np.float32)))
    loaded.graph.append(ir.node(operator, [loaded.graph.inputs[0], value]))
    assert shapes(load_samples(loaded, None, None), "values")[0] == found


def test_axes_without_a_name_may_differ(tmp_path: Path) -> None:
    pair = (("input_ids", INT, [None, None]), ("labels", INT, [None, None]))
    path = npz(tmp_path / "c.npz", input_ids=np.ones((1, 4), int), labels=np.ones((1, 2), int))
    (sample,) = load_samples(model(*pair), path, None)
    assert [array.shape for array in sample.feeds.values()] == [(1, 4), (1, 2)]


@pytest.mark.parametrize(
    ("mask", "length"), [([1, 1, 0, 0], 2), ([0, 1, 1, 0], 3), ([1, 1, 1, 1], 4), ([0, 0, 0, 0], 4)]
)
def test_padding_on_the_right_is_left_out(mask: list[int], length: int, tmp_path: Path) -> None:
    path = npz(tmp_path / "c.npz", input_ids=np.arange(4)[None], attention_mask=np.array([mask]))
    (sample,) = load_samples(model(IDS, MASK), path, None)
    assert {name: array.tolist() for name, array in sample.feeds.items()} == {
        "input_ids": [list(range(length))], "attention_mask": [mask[:length]],
    }  # fmt: skip


# --------------------------------------------------------------------------- held out


def ids_of(samples: Any) -> list[int]:
    return [int(sample.feeds["input_ids"][0, 0]) for sample in samples]


@pytest.mark.parametrize(("count", "held"), [(3, [3, 4]), (5, [5]), (6, [])])
def test_what_is_not_calibrated_on_is_held_out(count: int, held: list[int], tmp_path: Path) -> None:
    path = npz(tmp_path / "c.npz", input_ids=np.arange(6)[:, None].repeat(4, 1))
    samples = load_samples(model(IDS), path, None, max_samples=count)
    assert ids_of(samples) == list(range(count)) and ids_of(samples.held_out) == held
    assert ids_of(proof_samples(model(IDS), samples)) == (held or [0, 1])
    assert ids_of(proof_samples(model(IDS), list(samples))) == [0, 1]


def test_a_proof_sees_two_lengths(tmp_path: Path) -> None:
    path = npz(tmp_path / "c.npz", input_ids=np.ones((3, 300), int))
    some = proof_samples(model(IDS), load_samples(model(IDS), path, None))
    assert [sample.feeds["input_ids"].shape[1] for sample in some] == [300, 128]


def test_text_and_random_data_hold_samples_out(tmp_path: Path) -> None:
    lines = text(tmp_path, "".join(f"{letter * 10}\n" for letter in "abcdef"))
    samples = load_samples(model(IDS), lines, tokenizer(tmp_path), max_samples=3)
    assert ids_of(samples) == [4, 5, 6] and ids_of(samples.held_out) == [7, 8]
    drawn = load_samples(model(IDS), None, None, max_samples=3)
    kept = {sample.feeds["input_ids"].tobytes() for sample in drawn}
    assert len(kept | {sample.feeds["input_ids"].tobytes() for sample in drawn.held_out}) == 5
    assert len(drawn) == 3


# --------------------------------------------------------------------------- inputs that are made


def made(tmp_path: Path, *ports: Port, **arrays: Any) -> dict[str, np.ndarray]:
    arrays.setdefault("input_ids", np.array([[7, 8, 9]]))
    (sample,) = load_samples(model(IDS, *ports), npz(tmp_path / "c.npz", **arrays), None)
    return dict(sample.feeds)


def test_position_and_type_ids(tmp_path: Path) -> None:
    axes = ["batch", "sequence"]
    ports = (
        ("position_ids", INT, axes),
        MASK,
        ("token_type_ids", INT, axes),
        ("cache_position", INT, ["sequence"]),
    )
    feeds = made(tmp_path, *ports, attention_mask=np.array([[0, 1, 1]]))
    assert list(feeds) == ["input_ids", "position_ids", "attention_mask", "token_type_ids", "cache_position"]
    assert feeds["position_ids"].tolist() == [[0, 0, 1]]
    assert feeds["token_type_ids"].tolist() == [[0, 0, 0]]
    assert feeds["cache_position"].tolist() == [0, 1, 2]


def test_the_decoder_starts_with_the_shifted_input(tmp_path: Path) -> None:
    axes = ["batch", "decoder_sequence"]
    feeds = made(tmp_path, ("decoder_input_ids", INT, axes), ("decoder_attention_mask", INT, axes), MASK)
    assert feeds["decoder_input_ids"].tolist() == [[0, 7, 8]]
    assert feeds["decoder_attention_mask"].tolist() == [[1, 1, 1]]


def test_the_cache_is_empty(tmp_path: Path) -> None:
    cache = ("past_key_values.0.key", FLOAT, ["batch", 2, "past_sequence", 4])
    feeds = made(tmp_path, cache, ("use_cache_branch", BOOL, [1]))
    assert feeds["past_key_values.0.key"].shape == (1, 2, 0, 4)
    assert feeds["use_cache_branch"].tolist() == [False]


def test_what_cannot_be_made_is_asked_for(tmp_path: Path) -> None:
    port = ("speaker_embedding", FLOAT, ["batch", 512])
    path = npz(tmp_path / "c.npz", input_ids=np.array([[7, 8, 9]]))
    words = refusal(model(IDS, port), path, None)
    assert "input 'speaker_embedding' (float32 [batch, 512]) is missing" in words


# --------------------------------------------------------------------------- a part of the samples


@pytest.mark.parametrize(
    ("count", "tokens", "taken"),
    [(2, None, 2), (None, 10, 2), (None, 11, 3), (1, 11, 1), (3, 1, 1), (9, None, 4), (None, None, 4)],
)
def test_the_first_samples_end_at_a_count_or_at_tokens(count: int | None, tokens: int | None, taken: int) -> None:
    samples = [Sample({"input_ids": np.full((1, 5), number)}) for number in range(4)]
    found = list(first_samples(samples, count=count, tokens=tokens))
    assert [int(sample.feeds["input_ids"][0, 0]) for sample in found] == list(range(taken))


def test_a_long_sample_is_cut_where_the_model_takes_any_length() -> None:
    ids = np.arange(80).reshape(1, -1)
    sample = Sample({"input_ids": ids, "attention_mask": np.ones_like(ids)}, ids > 3)
    model = ir.load(cached_export("bert"))
    cut = shortened(model, sample, 64)
    assert {array.shape for array in cut.feeds.values()} == {(1, 64)} and cut.mask is not None
    np.testing.assert_array_equal(cut.mask, ids[:, :64] > 3)
    assert shortened(model, sample, 80) is sample
    model.graph.inputs[0].shape = ir.Shape([1, 80])
    assert shortened(model, sample, 64) is sample
