"""The user study of "MMGAN: Manifold-Matching Generative Adversarial Network" (Park et al. 2018), table
I: a web page on which people mark the images that they take for fake.

    python user_study.py --real mnist --fake dcgan=dcgan.npy --fake "mmgan rbf=runs/x/generated"
    python user_study.py --real cifar10 --fake dcgan=x.npy --host 0.0.0.0    # for others too
    python user_study.py --tally study.db --csv table.csv --chart table.png  # table I

Every participant sees --per-method images of each method and as many real ones, in a random order.
Each page holds equally many of each, so that it counts even if the participant sends no other.

A source of images is a folder or .zip of images, a uint8 .npy [N, H, W, C] or [N, H, W], an idx3 file,
or a data set (mnist, celeba, cifar10, stl10). The other scripts' --generate writes generated ones.
"""
from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import logging
import math
import os
import pathlib
import random
import re
import secrets
import sqlite3
import textwrap
import threading
import zipfile
from dataclasses import dataclass
from typing import Annotated, Optional

import flask
import jinja2
import numpy as np
import tyro
import waitress
from PIL import Image
from werkzeug.exceptions import HTTPException

from common import UserError, check_ranges, command_line, datasets, expand, reason, run, training, write_atomically

SCRIPT = pathlib.Path(__file__).stem
DATASETS = {"mnist": 28, "cifar10": 32, "stl10": 48, "celeba": 64}  # height and width in the papers
PAPER = {"real": (14.0, 4.0), "dcgan": (38.2, 75.3), "mmgan rbf": (32.4, 77.0),
         "mmgan exp": (35.4, 73.3), "mmgan no rg": (45.5, 76.6)}  # table I: % taken for fake, of MNIST and CelebA
COLUMNS = ("method", "share", "low", "high", "participants", "votes", "paper_mnist", "paper_celeba")


# ------------------------------------------------------------------------------ arguments
@dataclass
class Args:
    # images
    real: Optional[str] = None
    """Real images: mnist, cifar10, celeba, stl10, or a folder, .zip, .npy or idx3 file.
    All but mnist, cifar10, .npy and idx3 are resized to the fake images' size."""
    fake: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=SOURCE, once for each method. SOURCE: a folder or .npy that --generate wrote, or what --real takes.
    The table has the paper's figures for the names dcgan, "mmgan rbf", "mmgan exp" and "mmgan no rg"."""
    data_dir: str = "data"
    """Where data sets are kept and downloaded to."""
    # study
    db: str = "study.db"
    """The SQLite file of the votes. An interrupted study goes on with the same file and images."""
    per_method: int = 10
    """Images of each method, and real ones, that a participant sees on all pages together."""
    pages: int = 4
    """Pages that these images are spread over."""
    max_participants: int = 1000
    """After so many have sent a page, nobody else can start."""
    passkey: Optional[str] = None
    """Typed in on the first page, it starts a trial run, not counted. Default: random, printed."""
    # page
    zoom: Optional[int] = None
    """Screen pixels per image pixel. Default: images are about 112 pixels wide."""
    host: str = "127.0.0.1"
    """127.0.0.1: this machine alone; 0.0.0.0, or :: for IPv6: others too, over http, which is not encrypted."""
    port: int = 8000
    """The port to serve at."""
    # tally
    tally: Optional[str] = None
    """A study's SQLite file: print its table; serve nothing. The study may still be running."""
    csv: Optional[str] = None
    """With --tally: also write the table to this .csv."""
    chart: Optional[str] = None
    """With --tally: also draw the shares and their intervals to this .png."""


# --------------------------------------------------------------------------------- images
def open_images(source: str, data_dir: str, size: Optional[int] = None) -> np.ndarray:
    """A source's images, uint8 [N, H, W, C].

    An .npy or idx3 file is read whole: another process may write it anew while the study runs.

    size: side in pixels that a folder, .zip, celeba and stl10 are resized to. Default: the first
    image's or the paper's. Raises UserError: a source that cannot be read, or holds no such images.
    """
    def load(name: str, root: str | pathlib.Path, image_size: int) -> np.ndarray:
        return datasets.load(name, root, image_size).numpy().transpose(0, 2, 3, 1)

    path = expand(source)
    if source in ("celeba", "stl10"):
        return load(source, data_dir, image_size=size or DATASETS[source])
    if source in DATASETS:
        return load(source, data_dir, image_size=DATASETS[source])
    for folder in (path, path / "raw", path / "MNIST" / "raw"):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return load("mnist", folder, image_size=28)
    if path.is_dir() or zipfile.is_zipfile(path):
        return load("folder", path, image_size=size or first_size(path))
    try:
        if path.suffix == ".npy":
            images = np.load(path)
        else:
            magic, *shape = np.fromfile(path, dtype=">i4", count=4).tolist()
            if magic != 0x803:
                raise ValueError("not an idx3 file")
            images = np.fromfile(path, dtype=np.uint8, count=math.prod(shape), offset=16).reshape(shape)
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
            raise ValueError(f"{images.dtype} {list(images.shape)} is not uint8 [N, H, W, 1 or 3]")
    except Exception as error:  # whatever a cut or foreign file makes NumPy raise
        raise UserError(f"cannot read {source}: {reason(error)}; "
                        f"give a folder, .zip, .npy or idx3 file, or one of {', '.join(DATASETS)}") from None
    return images


def first_size(path: pathlib.Path) -> int:
    """The shorter side in pixels of the first image in a folder or .zip."""
    images, *_ = datasets.list_images(path)
    with zipfile.ZipFile(path) if path.is_file() else contextlib.nullcontext() as archive:
        for name, *_ in images:
            with contextlib.suppress(Exception):  # a damaged one, which load() will name
                return min(Image.open(archive.open(name) if archive else path / name).size)
    raise UserError(f"no images in {path} can be read")


def open_sources(args: Args) -> dict[str, np.ndarray]:
    """Real and fake images by method, uint8 [N, H, W, C].
    Raises UserError: flags that do not go together, too few images, images of two sizes."""
    if args.real is None or not args.fake or args.csv or args.chart:
        raise UserError("give --real SOURCE and --fake NAME=SOURCE; "
                        "or --tally FILE, with or without --csv and --chart")
    fake_sources: dict[str, str] = {}
    for entry in args.fake:
        name, _, source = entry.partition("=")
        if not (name.isprintable() and name and source) or name == "real" or name in fake_sources:
            raise UserError(f"--fake {' '.join(args.fake)!r}: "
                            "write NAME=SOURCE, each name once and none of them real")
        fake_sources[name] = source
    fakes = {name: open_images(source, args.data_dir) for name, source in fake_sources.items()}
    first = next(iter(fakes))
    height, width = fakes[first].shape[1:3]
    images_by_method = {"real": open_images(args.real, args.data_dir, size=height), **fakes}
    for name, images in images_by_method.items():
        h, w = images.shape[1:3]
        if (h, w) != (height, width):
            raise UserError(f"all images must have one size: those of {name} are {h}x{w}, "
                            f"those of {first} {height}x{width}")
        if len(images) < args.per_method:
            raise UserError(f"{name} has {len(images)} images, too few for --per-method {args.per_method}: "
                            f"give --per-method {len(images)}, and no more --pages than that")
    return images_by_method


def encode(image: np.ndarray) -> str:
    """An image [H, W, C] as a base64 PNG, RGB, uncompressed: its length depends on H and W alone.
    Compressed, a blurred image would be shorter."""
    rgb = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG", compress_level=0)
    return base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------- votes
SCHEMA = """
CREATE TABLE IF NOT EXISTS study (settings TEXT NOT NULL, name TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS showings (token TEXT PRIMARY KEY, participant TEXT NOT NULL, trial INTEGER NOT NULL,
    number INTEGER NOT NULL, page TEXT NOT NULL, method TEXT NOT NULL, image INTEGER NOT NULL, fake INTEGER, sent TEXT);
CREATE INDEX IF NOT EXISTS of_participant ON showings (participant);
"""  # a showing is an image that a participant is to see; fake is NULL until its page is sent


def assign(counts: dict[str, int], per_method: int, pages: int) -> list[list[tuple[str, int]]]:
    """A participant's pages of (method, image), shuffled: equally many of each method, no image twice."""
    draw = random.SystemRandom()
    chosen = {method: draw.sample(range(count), per_method) for method, count in counts.items()}
    layout = []
    for number in range(pages):
        showings = [(method, i) for method, images in chosen.items() for i in images[number::pages]]
        draw.shuffle(showings)
        layout.append(showings)
    return layout


class Study:
    """The SQLite file. `start` and `submit` write a transaction each, on the disk when they return.

    Between transactions the file is whole by itself: SQLite's rollback journal keeps no votes beside it.
    Participants, pages and showings are named by random tokens, which tell nothing of a method.
    `name` is random, too, and tells studies on one host apart.
    Raises UserError: not the file of a study, or of another one, which is left as it was.
    """

    def __init__(self, args: Args, images_by_method: dict[str, np.ndarray]):
        self.args = args
        self.counts = {method: len(images) for method, images in images_by_method.items()}
        self.lock = threading.Lock()  # of the connection; SQLite writes one transaction at a time
        sources = {method: training.fingerprint(images) for method, images in images_by_method.items()}
        settings = {"images": sources, "per_method": args.per_method, "pages": args.pages}
        try:
            self.db = sqlite3.connect(expand(args.db).absolute(), isolation_level="IMMEDIATE", check_same_thread=False)
            if not self.db.execute("SELECT * FROM sqlite_master").fetchall():  # a new file
                self.db.executescript(f"BEGIN IMMEDIATE; {SCHEMA}")
                self.db.execute("INSERT INTO study SELECT ?, ? WHERE NOT EXISTS (SELECT * FROM study)",
                                (json.dumps(settings), secrets.token_hex(4)))
                self.db.commit()
            saved, self.name = self.db.execute("SELECT settings, name FROM study").fetchone()
            if json.loads(saved) != settings:
                raise UserError(f"{args.db} is of another study, with other images, --per-method or --pages "
                                f"({saved}, here {json.dumps(settings)}): give another --db")
            # DELETE: no votes lie beside the file; EXTRA: a power loss undoes none; the rest: can it be written?
            self.db.executescript("PRAGMA journal_mode = DELETE; PRAGMA synchronous = EXTRA; "
                                  "UPDATE study SET settings = settings")
        except (sqlite3.Error, TypeError, ValueError) as error:  # the last two: odd settings, or none
            raise UserError(f"cannot keep votes in {args.db}: {error}; give another --db") from None

    def start(self, participant: str, trial: bool) -> bool:
        """Draw a new participant's pages; one that is there already keeps its own. participant: a token.
        False, and nothing drawn: enough people have taken part."""
        layout = assign(self.counts, per_method=self.args.per_method, pages=self.args.pages)
        rows = []
        for number, showings in enumerate(layout):
            page = secrets.token_urlsafe()
            for method, image in showings:
                rows.append((secrets.token_urlsafe(), participant, trial, number, page, method, image))
        with self.lock, self.db as db:
            db.execute("BEGIN IMMEDIATE")  # another server may have the same file
            begun = db.execute("SELECT 1 FROM showings WHERE participant = ?", (participant,)).fetchone()
            people, = db.execute(
                "SELECT COUNT(DISTINCT participant) FROM showings WHERE NOT trial AND fake IS NOT NULL").fetchone()
            if people >= self.args.max_participants and not trial and not begun:
                return False
            if not begun:
                db.executemany("INSERT INTO showings VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL)", rows)
        return True

    def next_page(self, participant: str) -> Optional[tuple[int, str, list[tuple[str, str, int]]]]:
        """The first page not sent: number, token, (token, method, image) of each showing. None: all are sent."""
        with self.lock:
            rows = self.db.execute(
                "SELECT number, page, token, method, image FROM showings "
                "WHERE participant = ? AND fake IS NULL ORDER BY rowid", (participant,)).fetchall()
        if not rows:
            return None
        first, page = rows[0][:2]
        return first, page, [showing for number, _, *showing in rows if number == first]

    def submit(self, participant: str, page: str, marked: list[str]) -> bool:
        """Store which showings of a page were marked as fake. Sent again, it keeps its first votes.
        False, and nothing stored: not a page of this participant, or not a showing of this page."""
        with self.lock, self.db as db:
            rows = db.execute("SELECT token FROM showings WHERE participant = ? AND page = ?",
                              (participant, page))
            tokens = {token for token, in rows}
            if not tokens or not tokens.issuperset(marked):
                return False
            db.executemany("UPDATE showings SET fake = ?, sent = datetime() WHERE token = ? AND fake IS NULL",
                           [(token in marked, token) for token in tokens])
        return True

    def result(self, participant: str) -> tuple[Optional[int], ...]:
        """A participant's trial, fakes shown, fakes marked, reals shown, reals marked; of nobody, all None."""
        with self.lock:
            return self.db.execute(
                "SELECT MAX(trial), SUM(method != 'real'), SUM(method != 'real' AND fake), "
                "SUM(method = 'real'), SUM(method = 'real' AND fake) FROM showings WHERE participant = ?",
                (participant,)).fetchone()


# ----------------------------------------------------------------------------------- page
TEMPLATES = {"base.html": """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --text: #1d1f23; --soft: #595e67; --line: #c3c7cd;
        --fake: #b3261e; --act: #1f5fbf; accent-color: var(--act) }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --card: #24272d; --text: #eceef1; --soft: #b0b6c0;
        --line: #4a4f58; --fake: #ff8a80; --act: #8ab8ff } }
* { box-sizing: border-box } :focus-visible { outline: 3px solid var(--act); outline-offset: 4px }
body { margin: 0; background: var(--page); color: var(--text); font: 1.0625rem/1.5 system-ui, sans-serif }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 2.5rem } .text { max-width: 38rem; padding-top: 12vh }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem } p { margin: 0 0 1rem } details { color: var(--soft) }
.progress { display: flex; gap: .8rem; color: var(--soft); margin-bottom: 1rem } progress { flex: 1; height: 1.5rem }
fieldset { border: 0; margin: 0 -5px 1.5rem; padding: 0; min-width: 0; font-size: 0; /* no spaces between images */
           text-wrap: balance } /* rows alike in length */
legend, [formmethod] { position: absolute; clip-path: inset(50%) } svg { height: 1.2rem; fill: currentColor }
.image { position: relative; display: inline-block; vertical-align: top; margin: 5px; width: {{ width or 0 }}px;
         max-width: calc(100% - 10px); border-radius: 8px; background: var(--card); box-shadow: 0 0 0 1px var(--line) }
.image img { display: block; width: 100%; height: auto; border-radius: 8px 8px 0 0; image-rendering: pixelated }
.image input { appearance: none; position: absolute; inset: 0; margin: 0; border-radius: 8px; cursor: pointer }
.image span { display: flex; justify-content: center; gap: .4rem; padding: .3rem; line-height: 1.25rem;
              color: var(--soft); font-size: .95rem; border-radius: 0 0 8px 8px }
.image input:checked { box-shadow: 0 0 0 3px var(--fake) } .image input:hover ~ span { color: var(--fake) }
.image input:checked ~ span { background: var(--fake); color: var(--page); font-weight: 600 }
button { font: inherit; font-weight: 600; padding: .7rem 1.6rem; border: 0; border-radius: 8px; cursor: pointer;
         background: var(--act); color: var(--page); min-width: min(100%, 14rem) }
</style></head><body><main class="{{ kind }}"><h1>{{ title }}</h1>{% block main %}{% endblock %}</main></body>""",

"text.html": """{% extends "base.html" %}{% block main %}{% for line in lines %}<p>{{ line }}</p>{% endfor %}
{% if start %}<form method="post"><p><button>Start</button></p><details><summary>Trial run</summary>
<label>Passkey (not counted) <input name="passkey" size="10"></label></details>
<input type="hidden" name="start" value="{{ start }}"></form>{% endif %}{% endblock %}""",

"page.html": """{% extends "base.html" %}{% block main %}<p>Click each image that you think was made by a computer.</p>
<div class="progress"><span id="where">Page {{ number + 1 }} of {{ pages }}</span>
<progress max="{{ pages }}" value="{{ number }}" aria-labelledby="where"></progress></div>
<form method="post" autocomplete="off"><button formmethod="dialog" tabindex="-1" aria-hidden="true">
</button>{# the form's default button, which Enter on an image presses: outside a dialog it does nothing #}
<fieldset><legend>Images that you think are fake</legend>{% for token, png in images %}
<label class="image"><input type="checkbox" name="fake" value="{{ token }}"><img src="data:image/png;base64,{{ png }}"
alt="image {{ loop.index }} of {{ loop.length }}"><span><svg viewBox="0 0 24 24" aria-hidden="true"><path
d="M17 3h4v12h-4zM15 3H5L2 11v5h8l-1 6 2 1 4-7z"/></svg>fake</span></label>{% endfor %}</fieldset>
<button>{{ "Send and finish" if number + 1 == pages else "Send and go on" }}</button>
{#- last, so that a form that was cut lacks it #}<input type="hidden" name="page" value="{{ page }}"></form>
{% endblock %}"""}


def create_app(study: Study, images_by_method: dict[str, np.ndarray]) -> flask.Flask:
    """The web pages, all at one address, so that a proxy may serve it at any path.
    Images are inside their page: no address, header or delay tells the method."""
    app = flask.Flask(SCRIPT, static_folder=None)
    app.jinja_loader = jinja2.DictLoader(TEMPLATES)
    app.config["MAX_CONTENT_LENGTH"] = 2**20
    args = study.args
    width = images_by_method["real"].shape[2]
    cookie = f"participant_{study.name}"

    def text(title: str, *lines: str, start: bool = False) -> str:
        """A page of text. start: with the Start button, whose form names the participant that it makes: sent twice,
        it is still one."""
        return flask.render_template("text.html", kind="text", title=title, lines=lines,
                                     start=secrets.token_urlsafe() if start else None)

    def participant() -> str:
        return flask.request.cookies.get(cookie, "")

    @app.get("/")
    def show():
        unsent = study.next_page(participant())
        if unsent is not None:
            number, page, showings = unsent
            images = [(token, encode(images_by_method[method][image])) for token, method, image in showings]
            zoom = args.zoom or max(1, round(112 / width))
            return flask.render_template("page.html", title="Which images are fake?", number=number,
                                         pages=args.pages, page=page, images=images, width=width * zoom)
        trial, fakes, fakes_marked, reals, reals_marked = study.result(participant())
        if trial is None:
            cookies = ["Cookies are needed. If you have just pressed Start, your browser did not keep this page's "
                       "cookie: allow it, then start again."] if "started" in flask.request.args else []
            return text("Which images are fake?", *cookies, "Some of the images that you will see are real, others "
                        "were made by a computer. Mark those that you think are fake, then send the page. Pages: "
                        f"{args.pages}.", "Please take part once only. Your votes are stored without your name. A "
                        "cookie tells them from other people's.", start=True)
        right, shown = fakes_marked + reals - reals_marked, fakes + reals
        return text("Thank you", f"You were right about {right} of {shown} images ({100 * right / shown:.0f}%).",
                    f"You marked {fakes_marked} of {fakes} fake images, "
                    f"and took {reals_marked} of {reals} real ones for fake.",
                    "This was a trial run. To take part, start again." if trial else "You can close this page.",
                    start=bool(trial))

    @app.post("/")
    def submit():
        form = flask.request.form
        if "start" in form:
            return start(form["start"], form.get("passkey", "").strip())
        if not study.submit(participant(), form["page"], marked=form.getlist("fake")):
            flask.abort(400)
        return flask.redirect("?sent", 303)

    def start(token: str, passkey: str):
        if passkey not in ("", args.passkey):
            return text("Wrong passkey", "Leave it empty to take part in the study.", start=True), 400
        if not re.fullmatch(r"[A-Za-z0-9_-]{43}", token):
            flask.abort(400)
        response = flask.redirect("?started", 303)
        trial, *_ = study.result(participant())
        if trial == 0 or study.next_page(participant()):
            return response  # begun in another window
        if not study.start(token, trial=passkey != ""):
            return text("The study is complete", "Enough people have taken part. Thank you all the same."), 403
        response.set_cookie(cookie, token, max_age=90 * 86400, httponly=True, samesite="Lax")
        return response

    @app.errorhandler(HTTPException)
    def refuse(error):
        if error.code >= 500:
            return text("Not stored", "The server failed. Reload this page to send it again."), 500
        status = 400 if flask.request.method == "POST" else error.code
        return text("Not valid", "Nothing was stored. Go back to your page and send it again."), status

    @app.after_request
    def set_headers(response):
        response.headers["Cache-Control"] = "no-store"
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; "
            "frame-ancestors 'none'")
        return response

    return app


def serve(app: flask.Flask, args: Args) -> None:
    """Serve the pages until a signal ends the process. Raises UserError: no such host, a port in use."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # else a line a request that waits
    try:
        server = waitress.create_server(app, host=args.host, port=args.port, threads=8)
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(f"cannot serve at {args.host}:{args.port}: {reason(error)}; give another --host or "
                        "--port") from None
    # localhost may be two addresses
    listening = getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]
    addresses = " and ".join(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                             for host, port in listening)
    print(f"the study is at {addresses}; passkey for trial runs: {args.passkey}; "
          f"table: --tally {args.db}; Ctrl-C ends it", flush=True)
    server.run()


# ---------------------------------------------------------------------------------- tally
FEWEST = 10  # participants for an interval: of fewer, too little is known of how people differ


def interval(marked: np.ndarray, shown: np.ndarray) -> tuple[float, float]:
    """95% interval of a method's share of images marked as fake.

    marked, shown: numbers of images by participant, [P]. The votes of one participant depend on each other. To how
    many independent votes they amount is told by the variance of a ratio of sums over participants. To these, one who
    calls half of the images fake is added, since shares near 0 or 1 hide how people differ. The interval is Wilson's
    for so many votes, with Student's quantile. docs/mmgan.md has its simulated coverage.
    """
    people, votes = len(marked), shown.sum()
    marks, all_shown = np.append(marked, shown.mean() / 2), np.append(shown, shown.mean())
    share = marks.sum() / all_shown.sum()
    variance = (people + 1) / people * ((marks - share * all_shown) ** 2).sum() / all_shown.sum() ** 2
    effective = min(votes, share * (1 - share) / variance) if variance else votes
    z, freedom = 1.96, people - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)  # Cornish and Fisher
    share = marked.sum() / votes
    middle = (share + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = t / (1 + t**2 / effective) * math.sqrt(share * (1 - share) / effective + t**2 / (4 * effective**2))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # which rounding may break


def tally(path: str) -> tuple[list[dict], str]:
    """The table's rows (last the paper's methods that the study lacks), and a line on what counted.
    Raises UserError: not the file of a study, no votes."""
    uri = expand(path).absolute().as_uri() + "?mode=rw"  # a file that is missing is not made
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            settings, = db.execute("SELECT settings FROM study").fetchone()
            votes = db.execute(
                "SELECT participant, method, SUM(fake != 0), COUNT(*) FROM showings "
                "WHERE NOT trial AND fake IS NOT NULL GROUP BY participant, method").fetchall()
            trials, unfinished = db.execute(
                "SELECT COUNT(DISTINCT participant) FILTER (WHERE trial), "
                "COUNT(DISTINCT page) FILTER (WHERE NOT trial AND fake IS NULL) FROM showings").fetchone()
        methods = list(json.loads(settings)["images"])
        people = sorted({participant for participant, *_ in votes})
        marked, shown = np.zeros((2, len(methods), len(people)), int)
        for participant, method, num_marked, num_shown in votes:
            at = methods.index(method), people.index(participant)
            marked[at], shown[at] = num_marked, num_shown
    except Exception as error:  # whatever a foreign file makes SQLite, JSON or the lines above raise
        raise UserError(f"cannot read {path}: {reason(error)}; give --tally the --db of a study") from None
    summary = f"not counted: {trials} trial runs, {unfinished} unfinished pages"
    if not votes:
        raise UserError(f"{path} has no votes yet ({summary})")
    rows = []
    for method, num_marked, num_shown in zip(methods, marked, shown):
        rows.append({"method": method, "participants": len(people), "votes": num_shown.sum()})
        if num_shown.any():
            rows[-1]["share"] = num_marked.sum() / num_shown.sum()
            if len(people) >= FEWEST:
                rows[-1]["low"], rows[-1]["high"] = interval(num_marked, num_shown)
    rows += [{"method": method} for method in PAPER if method not in methods]
    for row in rows:
        if row["method"] in PAPER:
            mnist, celeba = PAPER[row["method"]]
            row["paper_mnist"], row["paper_celeba"] = round(mnist / 100, 3), round(celeba / 100, 3)
    if len(people) < FEWEST:
        summary += f"; no intervals below {FEWEST} participants"
    return rows, f"{len(people)} participants, {shown.sum():,} votes; {summary}"


def table(rows: list[dict]) -> str:
    """The rows as text in columns; "-" where there is no figure."""
    lines = [("taken for fake", "share", "95% interval", "participants", "votes", "paper: MNIST", "CelebA")]
    for row in rows:
        cells = {key: f"{100 * v:.1f}%" if isinstance(v, float) else str(v) for key, v in row.items()}
        if "low" in cells:
            cells["interval"] = f"{cells['low']} to {cells['high']}"
        lines.append([cells.get(key, "-") for key in ("method", "share", "interval", *COLUMNS[4:])])
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines)


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


def draw_chart(path: pathlib.Path, rows: list[dict]) -> None:
    """Draw the shares and their intervals as bars, a PNG."""
    from common.pictures import Figure  # Matplotlib, which takes a second
    studied = [row for row in rows if "share" in row]
    methods = ["\n".join(textwrap.wrap(row["method"], 14)[:3]) for row in studied]
    nan = math.nan  # where there is no interval
    percent = np.array([[row["share"], row.get("low", nan), row.get("high", nan)] for row in studied]) * 100
    share, low, high = percent.T
    figure = Figure(figsize=(1.5 + 1.1 * len(studied), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(share)), share, width=0.6, yerr=(share - low, high - share), capsize=5, color="#7aa3dc")
    axes.set_xticks(range(len(share)), methods, parse_math=False)
    axes.set(ylabel="images taken for fake (%)", title=f"{studied[0]['participants']} participants"
             + (", 95% intervals" if np.isfinite(low).any() else ""))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


# ----------------------------------------------------------------------------------- main
def main() -> int:
    args = command_line(Args, None, __doc__)
    check_ranges(args, {"pages": "[1, inf)", "per_method": f"[{args.pages}, inf)", "port": "[0, 65536)",
                        "max_participants": "[1, inf)", "zoom": "[1, inf)"})
    if args.chart and not args.chart.lower().endswith(".png"):
        raise UserError(f"--chart {args.chart}: its name ends in .png")
    if args.tally:
        if args.csv and os.path.realpath(expand(args.csv)) == os.path.realpath(expand(args.tally)):
            raise UserError(f"--csv {args.csv} is the study: choose another name")
        rows, summary = tally(args.tally)
        print(f"{table(rows)}\n{summary}")
        if args.csv:
            write_atomically(expand(args.csv), lambda path: write_csv(path, rows))
        if args.chart:
            write_atomically(expand(args.chart), lambda path: draw_chart(path, rows))
        return 0
    images_by_method = open_sources(args)
    args.passkey = (args.passkey or "").strip() or secrets.token_hex(3).upper()
    serve(create_app(Study(args, images_by_method), images_by_method), args)
    return 0


if __name__ == "__main__":
    run(main)
