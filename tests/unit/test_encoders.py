"""Content encoders: names, fixed shapes, the strict image decoder, and vectors that do not depend on what stands beside them."""

from __future__ import annotations

import io
import json
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from jobs import content_embedding as job
from pipeline.encoders import BEHAVIOR_ENCODERS, CONTENT_ENCODERS, text
from pipeline.encoders import image as images
from pipeline.encoders.base import (
    EncoderOptions,
    bucket_of,
    encoder_id,
    finished,
    flaws,
    length_buckets,
    padded,
    rows_per_pass,
    weights_digest,
)
from pipeline.encoders.image import RejectReason, decode_image
from pipeline.encoders.text import pooled, read_pooling
from pipeline.errors import ConfigError, ContractError

TEXT = EncoderOptions(name="minilm", batch=4, size=64, normalize=True)
PICTURE = EncoderOptions(name="efficientnet_lite0", batch=2, size=64, normalize=True)
TITLES = [
    "Toy Story",
    "a film about toys that come alive when nobody looks",
    "GoldenEye",
    "spy " * 40,
    "x",
    "Four Rooms and a long evening in a hotel by the sea",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _no_network():
    def refuse(*_args):
        raise AssertionError("an encoder opened a connection")

    connect = socket.socket.connect
    socket.socket.connect = refuse
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="module")
def minilm():
    return CONTENT_ENCODERS["text"]["minilm"](job.model_folder("minilm", ""), TEXT)


@pytest.fixture(scope="module")
def minilm_bfloat16():
    return CONTENT_ENCODERS["text"]["minilm"](job.model_folder("minilm", ""), replace(TEXT, precision="bfloat16"))


@pytest.fixture(scope="module")
def lite0():
    return CONTENT_ENCODERS["image"]["efficientnet_lite0"](job.model_folder("efficientnet_lite0", ""), PICTURE)


def photos(count: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def file_of(pixels: np.ndarray | Image.Image, fmt: str, **options) -> bytes:
    stream = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stream, fmt, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that unfolds to width * height grey pixels."""
    squeeze = zlib.compressobj(1)
    honest = min(height, 10**8 // width)  # rows really there; a larger bomb is known by its header alone
    rows = squeeze.compress(bytes((width + 1) * honest)) + squeeze.flush()

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")


# ---------------------------------------------------------------- names and shapes


def test_naming_an_encoder_loads_no_torch():
    code = "import sys, pipeline.encoders, jobs.content_embedding; print(sorted({'torch', 'transformers', 'pyspark'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert found.stdout.strip() == "[]"


def test_behaviour_encoders_are_known_by_name():
    assert set(BEHAVIOR_ENCODERS) == {"sasrec", "bpr_mf", "ngcf", "lightgcn", "alpharec"}


def test_every_setting_and_the_weights_stand_in_the_id():
    changed = [
        encoder_id(TEXT, "a" * 64, "mean"),
        encoder_id(TEXT, "b" * 64, "mean"),
        encoder_id(TEXT, "a" * 64, "cls"),
        *(
            encoder_id(EncoderOptions(**{**vars(TEXT), **other}), "a" * 64, "mean")
            for other in ({"name": "n"}, {"batch": 8}, {"size": 32}, {"normalize": False}, {"precision": "bfloat16"})
        ),
    ]
    assert len(set(changed)) == len(changed)
    assert changed[0] == "minilm-aaaaaaaaaaaa-mean-s64-b4-l2"


def test_an_id_is_safe_as_a_folder_name():
    assert encoder_id(EncoderOptions(name="hf-../a b", batch=2, size=8, normalize=False), "0" * 64) == "hf-.._a_b-000000000000-s8-b2-raw"


def test_other_weights_and_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ContractError, match="no weights"):
        weights_digest(tmp_path, "*.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(ContractError, match="not the published ones"):
        CONTENT_ENCODERS["text"]["minilm"].identify(tmp_path, TEXT)


@pytest.mark.parametrize("max_tokens", [8, 20, 128, 512])
def test_a_text_goes_to_the_smallest_bucket_that_holds_it(max_tokens):
    buckets, lengths = length_buckets(max_tokens), np.arange(1, max_tokens + 1)
    found = np.asarray(buckets)[bucket_of(lengths, buckets)]
    assert [min(bucket for bucket in buckets if bucket >= length) for length in lengths] == found.tolist()
    assert all(rows_per_pass(bucket, 64) * bucket <= 64 * 16 for bucket in buckets)


def test_padding_keeps_the_rows_and_adds_zeros():
    assert padded([[1, 2], [3, 4]], 4).tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]


def test_normalising_and_flaws():
    vectors = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1]], dtype=np.float32)
    assert finished(vectors, normalize=True)[:2].tolist() == pytest.approx(np.array([[0.6, 0.8], [0, 0]], dtype=np.float32))
    assert flaws(vectors).tolist() == flaws(finished(vectors, normalize=True)).tolist() == ["", "all zero", "not finite", "not finite"]


# ---------------------------------------------------------------- text


def test_minilm_vectors_are_the_models_own(minilm):
    """Against the transformer on one unpadded text at a time, mean over its tokens; and against numbers of sentence-transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(job.model_folder("minilm", "")), local_files_only=True)
    found = minilm.encode(TITLES)
    for title, vector in zip(TITLES, found, strict=True):
        with torch.inference_mode():
            hidden = minilm._model(**tokenizer([title], truncation=True, max_length=TEXT.size, return_tensors="pt")).last_hidden_state[0].numpy()
        slow = np.add.reduce(hidden, axis=0) / len(hidden)
        assert vector @ slow / np.linalg.norm(slow) > 0.999999
    # SentenceTransformer(folder, device="cpu").encode("Toy Story")[:4], sentence-transformers 6.2.0
    assert found[0, :4] == pytest.approx([-0.0244231, 0.0460196, 0.0573621, 0.0488993], abs=2e-6)
    assert found.dtype == np.float32
    assert found.shape == (len(TITLES), minilm.dim) == (len(TITLES), 384)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_text_has_the_same_bits_alone_and_in_any_crowd(minilm, minilm_bfloat16, precision):
    minilm = minilm if precision == "float32" else minilm_bfloat16
    texts = [*TITLES, *(f"{title} number {number}" for number in range(5) for title in TITLES[:3])]
    whole = minilm.encode(texts)
    assert np.array_equal(np.concatenate([minilm.encode([text]) for text in texts]), whole)
    assert np.array_equal(minilm.encode(texts[::-1])[::-1], whole)
    assert np.array_equal(np.concatenate([minilm.encode(texts[:5]), minilm.encode(texts[5:])]), whole)


def test_bfloat16_products_leave_a_text_where_it_was(minilm, minilm_bfloat16):
    assert (minilm.encode(TITLES) * minilm_bfloat16.encode(TITLES)).sum(1).min() >= 0.999
    assert minilm_bfloat16.encoder_id == minilm.encoder_id + "-bfloat16"


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_without_its_instructions_is_said(tiny_text, monkeypatch, caplog, there):
    monkeypatch.setattr(text, "has_bfloat16", lambda: there)
    CONTENT_ENCODERS["text"]["hf"](tiny_text, replace(TEXT, precision="bfloat16"))
    assert ("would be faster" in caplog.text) is not there


def test_long_texts_are_cut_and_no_text_gives_no_rows(minilm):
    assert np.array_equal(*minilm.encode(["spy " * 500, "spy " * 501]))
    assert minilm.encode([]).shape == (0, 384)


def test_the_id_is_read_without_loading_the_model(minilm):
    assert minilm.encoder_id == CONTENT_ENCODERS["text"]["minilm"].identify(job.model_folder("minilm", ""), TEXT)
    assert minilm.encoder_id == "minilm-53aa51172d14-mean-s64-b4-l2"


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_counts_only_real_tokens(pooling):
    rng = np.random.default_rng(5)
    hidden, lengths = rng.normal(size=(3, 6, 4)), [2, 6, 1]
    mask = np.arange(6) < np.array(lengths)[:, None]
    slow = {"mean": [sum(row[:n]) / n for row, n in zip(hidden, lengths, strict=True)], "cls": hidden[:, 0]}
    slow["last"] = [row[n - 1] for row, n in zip(hidden, lengths, strict=True)]
    assert pooled(torch.from_numpy(hidden), torch.from_numpy(mask), pooling).numpy() == pytest.approx(np.array(slow[pooling]))


@pytest.fixture(scope="module")
def tiny_text(tmp_path_factory):
    """A folder with a tiny untrained BERT, its vocabulary and its pooling (first token)."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "shoe", "hat"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}), encoding="utf-8")
    return folder


def test_any_hugging_face_text_model_in_a_folder(tiny_text):
    options = EncoderOptions(name=f"hf-{tiny_text.name}", batch=2, size=128, normalize=False)
    encoder = CONTENT_ENCODERS["text"]["hf"](tiny_text, options)
    found = encoder.encode(["red shoe", "blue hat", "red shoe " * 40])
    assert found.shape == (3, 16)
    assert not np.allclose(found[0], found[1])
    assert "-cls-" in encoder.encoder_id
    assert encoder.encoder_id.startswith("hf-tiny-bert")


def test_an_unknown_pooling_is_refused(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}', encoding="utf-8")
    with pytest.raises(ConfigError, match="pools in a way"):
        read_pooling(tmp_path)


# ---------------------------------------------------------------- images


def test_folding_keeps_the_networks_function(lite0):
    pixels = photos(3)
    plain = images.load_lite0(job.model_folder("efficientnet_lite0", ""), PICTURE.size)
    with torch.inference_mode():
        scaled = (torch.from_numpy(pixels).float() - 127) / 128
        slow = plain.extract_features(scaled.permute(0, 3, 1, 2).contiguous()).mean((2, 3)).numpy()
    assert (lite0.encode(pixels) * slow).sum(1) / np.linalg.norm(slow, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_an_image_has_the_same_bits_alone_and_in_any_crowd(lite0):
    pixels = photos(7)
    whole = lite0.encode(pixels)
    assert whole.shape == (7, 1280)
    assert np.array_equal(np.concatenate([lite0.encode(pixels[row : row + 1]) for row in range(7)]), whole)
    assert np.array_equal(lite0.encode(pixels[::-1])[::-1], whole)


def test_any_hugging_face_vision_model_in_a_folder(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 16}
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}', encoding="utf-8")
    encoder = CONTENT_ENCODERS["image"]["hf"](tmp_path, EncoderOptions(name="hf-vit", batch=2, size=32, normalize=False))
    pixels = photos(3, 32)
    with torch.inference_mode():
        scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor([0.1, 0.2, 0.3])) / 0.5
        slow = ViTModel.from_pretrained(tmp_path).eval()(pixel_values=scaled.permute(0, 3, 1, 2)).pooler_output.numpy()
    assert encoder.encode(pixels) == pytest.approx(slow, abs=1e-5)
    assert encoder.dim == 16


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_a_good_picture_is_its_middle_square(fmt):
    wide = np.zeros((40, 120, 3), dtype=np.uint8)
    wide[:, 40:80] = (200, 30, 60)
    found = decode_image(file_of(wide, fmt, **({} if fmt == "PNG" else {"quality": 100})), 10_000, 20)
    assert found.shape == (20, 20, 3)
    assert found.dtype == np.uint8
    assert np.abs(found[:, 2:-2].astype(int) - (200, 30, 60)).max() < 8


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("L", (30, 30), 90), (90, 90, 90)),
        (Image.new("RGBA", (30, 30), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("LA", (30, 30), (70, 255)), (70, 70, 70)),
        (Image.new("RGB", (30, 30), (12, 140, 220)).quantize(4), (12, 140, 220)),
        (Image.fromarray(np.full((30, 30), 0x8040, dtype=np.uint16)), (0x80, 0x80, 0x80)),
        (Image.new("1", (30, 30), 1), (255, 255, 255)),
    ],
    ids=["grey", "transparent", "grey with alpha", "palette", "16 bit", "1 bit"],
)
def test_every_colour_mode_becomes_rgb(picture, colour):
    assert np.abs(decode_image(file_of(picture, "PNG"), 10_000, 16).astype(int) - colour).max() <= 1


def test_a_turned_photo_is_turned_back():
    upright = np.zeros((40, 40, 3), dtype=np.uint8)
    upright[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned right
    turned = decode_image(file_of(np.rot90(upright), "JPEG", exif=exif, quality=95), 10_000, 40)
    assert turned[:15].mean() > 240
    assert turned[-15:].mean() < 15


def test_a_bomb_is_refused_by_its_header():
    before = Image.MAX_IMAGE_PIXELS
    for content in (bomb(30_000, 30_000), bomb(8_000, 8_000)):
        found = decode_image(content, 50_000_000, 224)
        assert isinstance(found, RejectReason)
        assert found.reason == "image_too_many_pixels"
    assert before == Image.MAX_IMAGE_PIXELS
    assert isinstance(decode_image(bomb(300, 300), 90_000, 32), np.ndarray)
    assert decode_image(bomb(301, 300), 90_000, 32).reason == "image_too_many_pixels"


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused(fmt, share):
    content = file_of(photos(1)[0], fmt)
    found = decode_image(content[: max(12, int(len(content) * share))], 10_000, 32)
    assert isinstance(found, RejectReason)
    assert found.reason == "image_truncated"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image_undecodable"),
        (b"item_id,title\n1,a hat\n", "image_undecodable"),
        (file_of(photos(1)[0], "GIF"), "image_unsupported_format"),
        (file_of(photos(1)[0], "TIFF"), "image_unsupported_format"),
        (bomb(30, 30).replace(b"IHDR", b"IHDX"), "image_undecodable"),
    ],
    ids=["empty", "text named .jpg", "gif", "tiff", "png with a broken header"],
)
def test_what_is_no_picture_is_refused(content, reason):
    found = decode_image(content, 10_000, 32)
    assert isinstance(found, RejectReason)
    assert found.reason == reason
    assert found == decode_image(bytes(content), 10_000, 32)  # no address of an object in the detail


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_never_raise(fmt):
    rng, content = np.random.default_rng(11), file_of(photos(1, 24)[0], fmt)
    outcomes = set()
    for trial in range(300):
        broken = np.frombuffer(content, dtype=np.uint8).copy()
        places = rng.integers(0, len(broken) if trial % 2 else 64, size=rng.integers(1, 6))
        broken[places] = rng.integers(0, 256, size=len(places))
        found = decode_image(broken.tobytes(), 100_000, 16)
        outcomes.add(found.reason if isinstance(found, RejectReason) else found.shape)
    assert (16, 16, 3) in outcomes
    assert len(outcomes) > 1


# ---------------------------------------------------------------- the job's pure parts


@pytest.mark.parametrize("value", ["bert", "hf", "hf:", "efficientnet_lite0", ""])
def test_an_unknown_text_encoder_is_named_with_the_known_ones(value):
    with pytest.raises(ConfigError, match="minilm, none, precomputed"):
        job.parse_encoder(value, "text")


def test_known_encoders(tmp_path):
    assert job.parse_encoder("minilm", "text") == ("minilm", "")
    assert job.parse_encoder("hf:org/model", "image") == ("hf", "org/model")
    assert job.parse_encoder(f"hf:{tmp_path}", "image") == ("hf", str(tmp_path.resolve()))


def test_given_vectors_are_checked_and_normalised():
    given = pa.array([[3, 4], [np.nan, 1], [1, 2, 3], [0, 0], [None, 1], [], [np.inf, 0]], pa.list_(pa.float32()))
    found = job.checked_vectors(given, 2, normalize=True)
    assert found.vectors[0].tolist() == pytest.approx([0.6, 0.8])
    assert found.reasons.tolist() == ["", *["bad_vector"] * 6]
    assert found.details.tolist() == ["", "not finite", "width 3, expected 2", "all zero", "not finite", "width 0, expected 2", "not finite"]


def chunk_of(uris: list[str], hashes: list[str | None]) -> pa.RecordBatch:
    count = len(uris)
    columns = {"encoder_id": ["e"] * count, "modality": ["image"] * count, "content_hash": [f"h{row}" for row in range(count)]}
    columns |= {"item_id": [f"i{row}" for row in range(count)], "payload": uris, "bytes_hash": hashes}
    return pa.RecordBatch.from_pydict(columns)


def test_each_unusable_image_has_its_reason_and_the_rest_their_vectors(tmp_path, lite0):
    (tmp_path / "good.png").write_bytes(file_of(photos(1)[0], "PNG"))
    (tmp_path / "text.jpg").write_text("not a picture", encoding="utf-8")
    (tmp_path / "large.png").write_bytes(bytes(60_001))
    limits = job.Limits(image_root=str(tmp_path), max_bytes=60_000, max_pixels=10_000)
    uris = ["good.png", "text.jpg", "large.png", "absent.png", "../outside.png", "good.png"]
    chunk = chunk_of(uris, [None] * 5 + ["0" * 64])
    encoded = job.encode_images(chunk, lite0, PICTURE.size, limits)
    wanted = ["", "image_undecodable", "image_too_large", "image_missing", "image_outside_root", "image_changed"]
    assert encoded.reasons.tolist() == wanted
    rows = job.as_rows(chunk, encoded).to_pydict()
    assert [row is None for row in rows["vector"]] == [False, *[True] * 5]
    assert rows["reason"] == [None, *wanted[1:]]
    assert rows["vector"][0] == lite0.encode(photos(1)[:1])[0].tolist()
    assert rows["payload"] == uris
    assert str(tmp_path) not in str(rows["detail"])
