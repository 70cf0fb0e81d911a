"""`inspect --html`: what is drawn is what the cache holds, and a stranger's texts stay texts."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.builders import run_command
from tests.cache_builders import (
    SHARED,
    SetShape,
    Workshop,
    changed,
    make_workshop,
    teacher_chunk_logprobs,
    teacher_logits,
    write_cache,
    write_premasked,
)
from tide_cache.alignment import payload_positions
from tide_cache.cache import open_cache
from tide_cache.errors import CompatibilityError, ConfigError, TideError
from tide_cache.manifest import SourceFacts
from tide_cache.report import write_report
from tide_cache.report_data import NUM_BINS, gather
from tide_cache.report_svg import Series, bar_chart, line_chart, safe
from tide_cache.rows import table_to_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title='evil'</script><img src=x onerror=evil()>\"'&\u202e\x00"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shape = SetShape(num_samples=40)
    folder = tmp_path_factory.mktemp("workshop")
    return make_workshop(folder, shape, payloads=("candidates", "chunks"))


class Tags(html.parser.HTMLParser):
    """The tags of a page and the attributes in which scripts and addresses can stand."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def written(url: Path, path: Path, tokenizer: Path | None = None) -> str:
    write_report(str(url), path, tokenizer)
    return path.read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_teacher(workshop: Workshop) -> None:
    """Against the logits themselves, row by row."""
    cache = open_cache(workshop.cache)
    data = gather(cache)
    rows = [
        row
        for view in range(cache.num_views)
        for row in table_to_rows(cache.read_rows(view, range(cache.num_samples)), "positions")
    ]
    right, entropy, tail, time, chunk = [], [], [], [], []
    for row in rows:
        logits_PV = teacher_logits(row).astype(np.float64)
        labels = row.student_ids_L[payload_positions(row.student_mask_L, row.alignment_RX)]
        right += (logits_PV.argmax(axis=1) == labels).tolist()
        prob_PV = np.exp(logits_PV) / np.exp(logits_PV).sum(axis=1, keepdims=True)
        entropy += (-prob_PV * np.log(prob_PV)).sum(axis=1).tolist()
        tail += (1 - np.sort(prob_PV, axis=1)[:, -3:].sum(axis=1)).tolist()
        time += [row.timestep] * len(labels)
        chunk += np.exp(teacher_chunk_logprobs(row)).tolist()
    assert (data.num_rows, data.num_positions, data.temperature) == (80, len(right), 1.0)
    assert data.num_chunks == len(chunk)
    assert data.tail[1.0][2] == (3, pytest.approx(np.mean(tail), rel=1e-4))
    bins = (np.asarray(time) * NUM_BINS).astype(int)
    for drawn, values in (
        (data.accuracy, right),
        (data.entropy, entropy),
        (data.chunk_prob, chunk),
    ):
        means = [np.asarray(values, float)[bins == b].mean() for b in np.unique(bins)]
        assert [y for _, y in drawn.points()] == pytest.approx(means, rel=1e-4)
    sizes = data.bytes_by_column
    assert sum(sizes.values()) == pytest.approx(cache.manifest.counts["size_bytes"], abs=20)


def test_the_sample_is_bounded_and_spread(tmp_path: Path) -> None:
    shape = SetShape(num_samples=1200, samples_per_task=300)
    workshop = make_workshop(tmp_path, shape, payloads=("chunks",))
    data = gather(open_cache(workshop.cache), max_rows=256)
    assert 200 <= data.num_rows <= 256, "some row groups are small"
    assert [shown.row.view for shown in data.shown] == [0, 1, 1]
    assert data.shown[0].row.sample_id == data.shown[1].row.sample_id


@pytest.mark.parametrize("kind", ["cache", "premasked"])
def test_the_page_is_one_file(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    url = workshop.folder / kind
    text = written(url, tmp_path / "r.html")
    tags = Tags(text)
    assert tags.tags.count("script") == 1
    assert not {"link", "img", "iframe", "object"} & set(tags.tags)
    assert not [name for name, _ in tags.attributes if name in ("src", "href", "srcset")]
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "://" not in text.replace(str(url), "")
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert ("name", "viewport") in tags.attributes
    assert "prefers-color-scheme:dark" in text
    num_plots = 6 if kind == "cache" else 2
    assert tags.tags.count("svg") == num_plots
    assert open_cache(workshop.folder / kind).identity in text
    assert written(workshop.folder / kind, tmp_path / "again.html") == text


def test_text_is_shown_where_a_tokenizer_is_given(workshop: Workshop, tmp_path: Path) -> None:
    ids = written(workshop.cache, tmp_path / "ids.html")
    text = written(workshop.cache, tmp_path / "text.html", workshop.tokenizer)
    assert "as no tokenizer was given" in ids
    assert ">word" not in ids
    assert ">word" in text
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
        written(workshop.cache, tmp_path / "x.html", workshop.folder / "nothing.json")
    from tests.cache_builders import save_tokenizer

    save_tokenizer(tmp_path / "other", letters="xyz")
    with pytest.raises(CompatibilityError, match="not the student's tokenizer tiny"):
        written(workshop.cache, tmp_path / "x.html", tmp_path / "other")


def hostile_cache(folder: Path) -> Path:
    """A cache whose every text is an attack: names, licences, commands, sample ids, sources."""
    workshop = make_workshop(folder, SetShape(num_samples=4))
    sources = (
        SourceFacts(name=HOSTILE, fingerprint="f", licence=HOSTILE, num_rows=9, num_rows_taken=9),
    )
    write_premasked(
        folder / "p",
        workshop.tokenizer,
        SetShape(num_samples=4),
        change=changed(source=HOSTILE),
        sources=sources,
        provenance={"command": HOSTILE, "tide_cache": HOSTILE, "git_revision": HOSTILE},
    )
    write_cache(folder / "evil", folder / "p")
    path = folder / "evil/manifest.json"
    values = json.loads(path.read_text())
    values["build_provenance"]["command"] = HOSTILE
    values["teacher_model"]["name"] = values["student"]["name"] = HOSTILE
    values["dropped"] = {HOSTILE: 3}
    path.write_text(json.dumps(values))
    return folder / "evil"


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    evil = hostile_cache(tmp_path)
    text = written(evil, tmp_path / "r.html")
    plain = written(tmp_path / "cache", tmp_path / "plain.html")
    assert text.count("&lt;script&gt;document.title") >= 6
    assert Tags(text).tags.count("script") == 1
    assert "img" not in Tags(text).tags
    # Its tags are those of the page of a friend's cache.
    assert set(Tags(text).tags) == set(Tags(plain).tags)
    assert {name for name, _ in Tags(text).attributes} == {
        name for name, _ in Tags(plain).attributes
    }
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "&lt;U+202E&gt;&lt;U+0000&gt;" in text


def test_numbers_that_are_none_and_empty_plots() -> None:
    assert "nothing to draw" in line_chart([], x_label="x", y_label="y")
    assert "nothing to draw" in bar_chart([], unit="", label="none")
    flat = line_chart([Series(name="a", points=[(1, 0), (1, 0)])], x_label="x", y_label="y")
    tiny = line_chart(
        [Series(name="a", points=[(1, 1e-9), (64, 0.0)])],
        x_label="x", y_label="y", log_x=True, log_y=True,
    )  # fmt: skip
    for chart in (flat, tiny):
        assert "nan" not in chart
        assert "inf" not in chart
    assert safe("a\nb<\u2066") == "a&lt;U+000A&gt;b&lt;&lt;U+2066&gt;"


def test_a_row_that_is_not_sound_makes_no_page(workshop: Workshop, tmp_path: Path) -> None:
    write_premasked(
        tmp_path / "p",
        workshop.tokenizer,
        SetShape(num_samples=4),
        change=changed(student_ids_L=np.full(4, SHARED + 5, dtype=np.int32)),
    )
    with pytest.raises(TideError):
        written(tmp_path / "p", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_two_caches_of_one_set_are_drawn_beside_each_other(
    workshop: Workshop, tmp_path: Path
) -> None:
    """With the other half revealed, and without: two lines a plot, the second set's its own."""
    write_cache(tmp_path / "without", workshop.premasked, k=9, comp_demo=False)
    alone = written(workshop.cache, tmp_path / "alone.html")
    assert "masked positions, other half revealed." in alone
    assert "all masks hidden" not in alone
    write_report(
        str(workshop.cache), tmp_path / "both.html", None, beside=str(tmp_path / "without")
    )
    both = (tmp_path / "both.html").read_text(encoding="utf-8")
    for line in ("most likely id is the true one", "mean p(true id)", "entropy"):
        for sight in ("other half revealed", "all masks hidden"):
            assert f"{line}, {sight}" in both
    assert both.count("<polyline") == alone.count("<polyline") + 3
    write_premasked(tmp_path / "p", workshop.tokenizer, SetShape(num_samples=5))
    write_cache(tmp_path / "other", tmp_path / "p")
    with pytest.raises(CompatibilityError, match="other: not a cache of the premasked set of"):
        write_report(
            str(workshop.cache), tmp_path / "no.html", None, beside=str(tmp_path / "other")
        )
    assert not (tmp_path / "no.html").exists()


def test_the_command(workshop: Workshop, tmp_path: Path) -> None:
    done = run_command("inspect", workshop.cache, "--html", tmp_path / "r.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'r.html'}\n"
    done = run_command("inspect", workshop.cache, "--html", tmp_path / "no/such/r.html")
    assert done.returncode == 1
    assert "cannot write" in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("kind", ["friend", "stranger"])
def test_a_browser_draws_it_without_errors(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    cache = workshop.cache if kind == "friend" else hostile_cache(tmp_path)
    path = tmp_path / "report.html"
    written(cache, path)
    dom, log = in_browser(path, tmp_path / "profile")
    assert "CONSOLE" not in log, log
    assert "<title>Teacher cache" in dom
    assert dom.count("<polyline") == (6 if kind == "friend" else 5)
    assert len(re.findall(r"<circle class=\"dot", dom)) > 40
    assert len(re.findall(r"<rect class=\"bar", dom)) >= 10
    assert dom.count('class="t a"') > 1
    assert "evil'" not in dom.replace("&lt;", "").split("<title>")[1].split("</title>")[0]


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_pointing_at_a_token_shows_what_the_teacher_said(
    workshop: Workshop, tmp_path: Path
) -> None:
    """By a second script, whose hash is allowed in this copy of the page."""
    import base64
    import hashlib

    text = written(workshop.cache, tmp_path / "r.html", workshop.tokenizer)
    script = (
        "const token = document.querySelector('[data-said]');"
        "token.dispatchEvent(new Event('mouseover', {bubbles: true}));"
        "document.title = document.getElementById('tip').hidden ? 'hidden' : "
        "'shown ' + document.getElementById('tip').textContent;"
        "document.body.dispatchEvent(new Event('mouseover', {bubbles: true}));"
        "document.title += document.getElementById('tip').hidden ? ' gone' : ' there';"
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    changed_page = text.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "</body>", f"<script>{script}</script></body>"
    )
    (tmp_path / "r.html").write_text(changed_page)
    dom, log = in_browser(tmp_path / "r.html", tmp_path / "profile")
    assert "CONSOLE" not in log, log
    title = dom.split("<title>")[1].split("</title>")[0]
    assert re.match(r"shown \S+\s+true: p = 0\.\d+\s", title), title
    assert title.endswith(" gone")
    # And the page's own policy keeps a script out that it does not name.
    (tmp_path / "r.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    dom, log = in_browser(tmp_path / "r.html", tmp_path / "profile")
    assert "<title>Teacher cache" in dom
    assert "Content Security Policy" in log


def in_browser(path: Path, profile: Path) -> tuple[str, str]:
    """The page's DOM once it is drawn, and what the browser had to say."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
