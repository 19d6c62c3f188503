"""user_study.py: sources, assignment, votes that stay, forged forms, the tally, and the pages in a real browser."""
import base64
import collections
import contextlib
import csv
import http.client
import io
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
import types
import urllib.parse
import urllib.request

import launcher
import make_data
import numpy as np
import pytest
import waitress.adjustments
import waitress.server
import waitress.wasyncore
from PIL import Image

import user_study
from common import UserError

METHODS = ("real", "dcgan", "mmgan rbf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arguments(folder, **changes):
    return user_study.Args(db=str(folder / "study.db"), passkey="0DEE2A", **changes)


def make_sources():
    """Grey images 8x8, whose first two pixels are the method's number and the image's."""
    sources = {}
    for i, method in enumerate(METHODS):
        sources[method] = make_data.pictures(100, 8, channels=1)
        sources[method][:, 0, 0, 0] = i
        sources[method][:, 0, 1, 0] = np.arange(100)
    return sources


def make_app(folder, **changes):
    """A study of these images."""
    sources = make_sources()
    study = user_study.Study(arguments(folder, **changes), sources)
    return user_study.create_app(study, sources), study


@contextlib.contextmanager
def served(app):
    sockets, stop = {}, threading.Event()
    server = waitress.create_server(app, map=sockets, host="127.0.0.1", port=0, threads=8)

    def run():
        while not stop.is_set():
            waitress.wasyncore.loop(timeout=0.1, map=sockets, count=1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server.effective_port
    finally:
        stop.set()
        thread.join()
        server.task_dispatcher.shutdown()
        waitress.wasyncore.close_all(sockets)


def decode(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


class Page:
    """What a browser sees."""

    def __init__(self, html):
        self.token = re.search(r'name="page" value="([^"]+)"', html)[1]
        self.images = re.findall(r'name="fake" value="([^"]+)"><img src="data:image/png;base64,([^"]+)"', html)

    def shown(self):
        """(method, image) by name."""
        pixels = {name: decode(png)[0, :2, 0] for name, png in self.images}
        return {name: (METHODS[method], image) for name, (method, image) in pixels.items()}

    def form(self, fake):
        return {"fake": list(fake), "page": self.token}


def start_token(html):
    """What the Start button sends."""
    return re.search(r'name="start" value="([^"]+)"', html)[1]


def start(browser, passkey=""):
    """Press Start on the first page."""
    html = browser.get("/").text
    token = start_token(html) if "Start</button>" in html else "of-another-window".ljust(43, "x")
    return browser.post("/", data={"passkey": passkey, "start": token})


def votes(study):
    """(method, image, fake) of every image of a page that was sent."""
    return study.db.execute("SELECT method, image, fake FROM showings WHERE fake IS NOT NULL").fetchall()


# -------------------------------------------------------------------------------- sources
def test_sources(tmp_path):
    """Every kind of source gives the same images."""
    images = make_data.pictures(20, 28, channels=1)  # [20, 28, 28, 1]
    make_data.mnist(tmp_path / "data")
    np.save(tmp_path / "grey.npy", images[..., 0])
    np.save(tmp_path / "channel.npy", images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"folder/{i:03d}.png")
    shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "folder")
    idx = "data/MNIST/raw/train-images-idx3-ubyte"
    sources = {name: str(tmp_path / name) for name in ("grey.npy", "channel.npy", "folder", "packed.zip", "data/MNIST",
                                                        idx)}
    fakes = tuple(f"{name}={path}" for name, path in sources.items())
    opened = user_study.open_sources(user_study.Args(real="mnist", data_dir=str(tmp_path / "data"), fake=fakes))
    assert list(opened) == ["real", *sources]
    for name, found in opened.items():
        assert np.array_equal(found, np.broadcast_to(images, (20, 28, 28, found.shape[3]))), name
        assert {user_study.encode(i) for i in found} == {user_study.encode(i) for i in images}


@pytest.mark.parametrize("fake, message", [
    ("dcgan", "write NAME=SOURCE"), ("a\nb=a.npy", "write NAME=SOURCE"), ("\udcff=a.npy", "write NAME=SOURCE"),
    ("dcgan=none.npy", "cannot read none.npy"), ("real=a.npy", "write NAME=SOURCE"), ("=a.npy", "write NAME=SOURCE"),
    ("dcgan=absent.npy", "cannot read absent.npy"), ("dcgan=text", "cannot read text: not an idx3 file"),
    ("dcgan=cut.npy", "cannot read cut.npy"), ("dcgan=float.npy", "float32 [20, 28, 28, 1] is not uint8"),
    ("dcgan=empty", "by its name: mnist, cifar10, stl10, celeba"),
    ("dcgan=few.npy", "dcgan has 3 images, too few for --per-method 10: give --per-method 3"),
    ("dcgan=small.npy", "those of real are 28x28, those of dcgan 14x14"),
    ("dcgan=huge.npy", "cannot read huge.npy"), ("dcgan=foreign.npy", "cannot read foreign.npy"),
    ("dcgan=cut.zip", "cannot read"), ("dcgan=cut-idx", "cannot read cut-idx"), ("dcgan=~nosuchuser/a.npy", "home")])
def test_source_errors(tmp_path, monkeypatch, fake, message):
    monkeypatch.chdir(tmp_path)
    images = make_data.pictures(20, 28)
    for name, array in {"a": images, "few": images[:3], "small": images[:, ::2, ::2],
                        "float": images[..., 0].astype(np.float32), "none": images[:, :0]}.items():
        np.save(f"{name}.npy", array)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:5000])
    (tmp_path / "text").write_text("a text, not a picture")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1%s, 8, 8, 3)}" % (b"0" * 30)
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (tmp_path / "foreign.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00{((((\n")
    (tmp_path / "cut-idx").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(1000))
    (tmp_path / "empty").mkdir()
    shutil.make_archive(tmp_path / "whole", "zip", tmp_path, "a.npy")
    (tmp_path / "cut.zip").write_bytes(b"x" * 100 + (tmp_path / "whole.zip").read_bytes()[-60:])
    with pytest.raises(UserError, match=re.escape(message)):
        user_study.open_sources(user_study.Args(real="a.npy", fake=(fake,)))


@pytest.mark.parametrize("thumbnails", [".thumbs", "@eaDir", "__MACOSX"])
@pytest.mark.parametrize("packed", [False, True])
def test_thumbnails_do_not_set_the_size(tmp_path, thumbnails, packed):
    """Real images are resized to the fakes' size, and fakes shown at their own, whatever lies hidden beside them."""
    folder = tmp_path / "images"
    (folder / thumbnails).mkdir(parents=True)
    for i, image in enumerate(make_data.pictures(12, 64)):
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(image[::8, ::8]).save(folder / thumbnails / f"{i}.png")
    source = shutil.make_archive(tmp_path / "packed", "zip", folder) if packed else folder
    assert user_study.open_images(str(source), "").shape == (12, 64, 64, 3)


def test_home(tmp_path, monkeypatch):
    """~ is a home folder inside NAME=SOURCE too, where a shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", make_data.pictures(12, 8))
    sources = user_study.open_sources(user_study.Args(real="~/x.npy", fake=("dcgan=~/x.npy",)))
    assert list(sources) == ["real", "dcgan"]
    user_study.Study(user_study.Args(db="~/votes.db"), sources)
    assert (tmp_path / "votes.db").exists()


def test_a_source_that_is_written_anew(tmp_path):
    """Another process cuts the .npy, or writes other images into it: the study shows what it began with."""
    file = tmp_path / "x.npy"
    images = make_data.pictures(100, 64)
    np.save(file, images)
    sources = user_study.open_sources(user_study.Args(real=str(file), fake=(f"dcgan={file}",)))
    file.write_bytes(b"")
    for method in sources:
        assert np.array_equal(sources[method], images)  # of a map: SIGBUS


# ------------------------------------------------------------------ assignment, blindness
@pytest.mark.parametrize("per_method, pages", [(10, 4), (7, 1), (3, 3)])
def test_assignment(per_method, pages):
    layouts = [user_study.assign(dict.fromkeys(METHODS, 12), per_method, pages) for _ in range(50)]
    for layout in layouts:
        assert len(layout) == pages and len(set(sum(layout, []))) == 3 * per_method  # no image twice
        for page in layout:
            assert len(set(collections.Counter(method for method, _ in page).values())) == 1
        assert collections.Counter(m for m, _ in sum(layout, [])) == dict.fromkeys(METHODS, per_method)
    assert len({str(layout) for layout in layouts}) == 50  # an order of one's own
    assert {layout[0][0][0] for layout in layouts} == set(METHODS)  # 50 first images: (2/3)**50 to fail
    assert {i for layout in layouts for _, i in sum(layout, [])} == set(range(12))


def test_blind(tmp_path):
    """Two showings share no name; PNGs of all methods have one length, mode and no text; no header tells anything."""
    app, study = make_app(tmp_path)
    names, lengths = [], set()
    for _ in range(2):
        browser = app.test_client()
        start(browser)
        answer = browser.get("/")
        page = Page(answer.text)
        names += [name for name, _ in page.images]
        for _, png in page.images:
            picture = Image.open(io.BytesIO(base64.b64decode(png)))
            assert picture.mode == "RGB" and not picture.info
            lengths.add(len(png))
        assert answer.headers["Cache-Control"] == "no-store" and "ETag" not in answer.headers
        assert not any(method in answer.text + str(answer.headers) for method in METHODS[1:])
    assert len(set(names)) == len(names) == 18 and len(lengths) == 1
    images = [np.zeros((8, 8, 3), np.uint8), make_data.pictures(1, 8)[0], make_data.pictures(1, 8, channels=1)[0]]
    assert {len(user_study.encode(image)) for image in images} == {len(page.images[0][1])}


# ---------------------------------------------------------------------------------- votes
def test_study(tmp_path):
    """A participant goes through; the thank-you page and the tally agree; a trial run is not counted."""
    app, study = make_app(tmp_path, per_method=5, pages=2)
    for key, status in (("0DEE2A", 303), ("", 303), ("wrong", 400)):
        browser = app.test_client()
        assert start(browser, key).status_code == status
        if status == 400:
            assert "Start" in browser.get("/").text
            continue
        for number in range(2):
            page = Page(browser.get("/").text)
            assert len(page.images) == 3 * (3 - number)
            form = page.form(name for name, (method, _) in page.shown().items() if method == "dcgan")
            assert browser.post("/", data=form).status_code == 303
        thanks = browser.get("/").text
        assert "right about 10 of 15 images (67%)" in thanks and "marked 5 of 10 fake" in thanks
        assert "took 0 of 5 real" in thanks and ("trial" in thanks) == bool(key)
    start(app.test_client())  # who never sends a page
    rows, summary = user_study.tally(study.args.db)
    assert [(r["share"], r["votes"]) for r in rows[:3]] == [(0, 5), (1, 5), (0, 5)]
    assert summary == ("1 participants, 15 votes; not counted: 1 trial runs, 2 unfinished pages; no intervals below "
                       "10 participants")
    assert not any("low" in row for row in rows) and len(user_study.table(rows).splitlines()) == 6


def test_refused_forms(tmp_path):
    """Forms that are cut, forged or of another participant get a 400 and change nothing."""
    app, study = make_app(tmp_path)
    browser, other = app.test_client(), app.test_client()
    for b in (browser, other):
        start(b)
    mine, others = (Page(b.get("/").text) for b in (browser, other))
    names = [name for name, _ in mine.images]
    for form in ({}, {"fake": names}, {"page": ""}, {"page": mine.token[:-1]}, {"page": "x' OR 1=1 --"},
                 {"page": mine.token, "fake": [*names, "forged"]}, {"page": mine.token, "fake": others.images[0][0]},
                 others.form([]), others.form(names), {"page": b"\xff\x00"}, {"page": "0"}, {"start": "forged"},
                 {"start": "é" * 43}):
        answer = browser.post("/", data=form)
        assert answer.status_code == 400 and "Nothing was stored" in answer.text, form
    assert app.test_client().post("/", data=mine.form(names)).status_code == 400  # no cookie
    assert browser.post("/", data=b"x" * 2**21, content_type="text/plain").status_code == 400
    assert browser.get("/results").status_code == 404 and browser.get("/study.db").status_code == 404
    assert votes(study) == []
    encoded = urllib.parse.urlencode(mine.form(names), doseq=True)
    with served(app) as port:  # the connection breaks off before the form's end
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.putrequest("POST", "/")
        cookie = f"participant_{study.name}"
        for header, value in (("Cookie", f"{cookie}={browser.get_cookie(cookie).value}"),
                              ("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", len(encoded))):
            connection.putheader(header, str(value))
        connection.endheaders(encoded[:-10].encode())
        connection.close()
    assert votes(study) == []
    assert browser.post("/", data=mine.form(names)).status_code == 303 and len(votes(study)) == len(names)


def test_sent_twice(tmp_path):
    app, study = make_app(tmp_path)
    browser = app.test_client()
    start(browser)
    page = Page(browser.get("/").text)
    for fake in (page.shown(), []):
        assert browser.post("/", data=page.form(fake)).status_code == 303
    assert len(votes(study)) == 9 and all(fake for _, _, fake in votes(study))
    assert Page(browser.get("/").text).token != page.token


def test_limit(tmp_path):
    """Of those who sent a page; who has started may go on."""
    app, study = make_app(tmp_path, max_participants=2)
    people = [app.test_client() for _ in range(4)]
    for person in people:
        assert start(person).status_code == 303
    for person in people[:3]:
        assert start(app.test_client()).status_code == (403 if person == people[2] else 303)
        assert person.post("/", data=Page(person.get("/").text).form([])).status_code == 303
    assert start(app.test_client(), "0DEE2A").status_code == 303
    assert start(people[3]).status_code == 303 and Page(people[3].get("/").text)


def test_other_images(tmp_path):
    """A study goes on with its own images and settings alone; another one's file stays as it is."""
    app, study = make_app(tmp_path)
    start(app.test_client())
    before = (tmp_path / "study.db").read_bytes()
    others = {method: make_data.pictures(100, 8, channels=1) for method in METHODS}
    for sources, changes in ((others, {}), (None, {"pages": 2}), (None, {"per_method": 5})):
        with pytest.raises(UserError, match="of another study"):
            if sources:
                user_study.Study(arguments(tmp_path, **changes), sources)
            else:
                make_app(tmp_path, **changes)
    assert (tmp_path / "study.db").read_bytes() == before
    make_app(tmp_path)


@pytest.mark.parametrize("journal", ["DELETE", "WAL"])
def test_a_database_of_another_program(tmp_path, journal):
    """Refused, and left as it is."""
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as db:
        db.executescript(f"PRAGMA journal_mode = {journal}; CREATE TABLE addresses (name TEXT)")
    before = (tmp_path / "study.db").read_bytes()
    with pytest.raises(UserError, match="cannot keep votes in"):
        make_app(tmp_path)
    assert (tmp_path / "study.db").read_bytes() == before


def test_votes_are_in_the_file(tmp_path):
    """A copy of the file alone has each vote that was answered, while the study runs and after it ended."""
    app, study = make_app(tmp_path)
    browser = app.test_client()
    start(browser)
    for pages in (1, 2):
        assert browser.post("/", data=Page(browser.get("/").text).form([])).status_code == 303
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "study.db", tmp_path / "copy/study.db")
        rows, _ = user_study.tally(str(tmp_path / "copy/study.db"))
        assert sum(row.get("votes", 0) for row in rows) == 9 * pages
    copied, _ = make_app(tmp_path / "copy")  # it goes on there
    (cookie, other) = (f"participant_{study.name}", copied.test_client())
    other.set_cookie(cookie, browser.get_cookie(cookie).value)
    assert "Page 3 of 4" in other.get("/").text


def test_a_study_that_another_program_has_opened(tmp_path, monkeypatch):
    """A write-ahead log that it has set is folded in; sources in another order are the same; one that cannot be written
    is an error at the start."""
    app, study = make_app(tmp_path)
    study.db.executescript("PRAGMA journal_mode = WAL")
    start(app.test_client())
    study.db.close()
    study = user_study.Study(arguments(tmp_path), dict(reversed(make_sources().items())))
    assert study.db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    study.db.close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **kwargs: connect(f"file:{path}?mode=ro", uri=True, **kwargs))
    with pytest.raises(UserError, match="cannot keep votes in .*readonly"):
        make_app(tmp_path)


# -------------------------------------------------------------------- starting, cookies
def test_double_click_on_start(tmp_path):
    """Two requests of one form, at once: one participant. Start in a second window goes on with the first's."""
    app, study = make_app(tmp_path)
    windows = app.test_client(), app.test_client()
    token = start_token(windows[0].get("/").text)
    threads = [threading.Thread(target=w.post, args=("/",), kwargs={"data": {"start": token}}) for w in windows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Page(windows[0].get("/").text).token == Page(windows[1].get("/").text).token
    late = start_token(app.test_client().get("/").text)  # a window that was opened before
    assert windows[0].post("/", data={"start": late}).status_code == 303
    assert Page(windows[0].get("/").text).token == Page(windows[1].get("/").text).token
    drawn = study.db.execute("SELECT COUNT(DISTINCT participant), COUNT(*) FROM showings").fetchone()
    assert drawn == (1, 3 * study.args.per_method)


def test_without_cookies(tmp_path):
    """One is told that they are needed, and takes nobody's place."""
    app, study = make_app(tmp_path, max_participants=1)
    browser = app.test_client(use_cookies=False)
    for _ in range(3):
        answer = browser.post("/", data={"start": start_token(browser.get("/").text)}, follow_redirects=True)
        assert "Cookies are needed" in answer.text and "Start</button>" in answer.text
    other = app.test_client()
    start(other)
    assert other.post("/", data=Page(other.get("/").text).form([])).status_code == 303


def test_two_studies_on_one_host(tmp_path):
    """A browser sends a host's cookies to all its ports; each study keeps its own participant."""
    (tmp_path / "other").mkdir()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with contextlib.ExitStack() as both:
        ports = [both.enter_context(served(make_app(folder)[0])) for folder in (tmp_path, tmp_path / "other")]

        def request(port, **form):
            data = urllib.parse.urlencode(form, doseq=True).encode() or None
            return browser.open(f"http://127.0.0.1:{port}/", data).read().decode()

        for port in ports:
            request(port, start=start_token(request(port)))
        for number in range(1, 5):
            for port in ports:
                html = request(port)
                assert f"Page {number} of 4" in html
                request(port, **Page(html).form([]))
        assert all("Thank you" in request(port) for port in ports)


@pytest.mark.parametrize("path", ["/study/", "/study", "/"])
def test_behind_a_proxy(tmp_path, path):
    """A proxy that serves the study at a path of its own, with or without a slash at the end: every link leads back."""
    app, study = make_app(tmp_path, pages=2)
    browser, here = app.test_client(), f"http://host{path}"

    def request(method, url, data=None):
        split = urllib.parse.urlsplit(url)
        assert split.netloc == "host" and split.path == path, url  # else it goes past the study
        answer = browser.open("/?" + split.query, method=method, data=data)
        return urllib.parse.urljoin(url, answer.location) if answer.location else url, answer.text

    _, html = request("GET", here)
    for number in range(3):
        action = re.search(r'<form method="post"[^>]*?(?: action="([^"]*)")?>', html)[1]
        form = Page(html).form([]) if number else {"start": start_token(html)}
        here, _ = request("POST", urllib.parse.urljoin(here, action or ""), form)
        here, html = request("GET", here)
    assert "Thank you" in html


def test_addresses(tmp_path, monkeypatch, capsys):
    """A name that is two addresses, and an IPv6 address, which a URL has in brackets."""
    app, study = make_app(tmp_path)
    for kind in (waitress.server.BaseWSGIServer, waitress.server.MultiSocketServer):
        monkeypatch.setattr(kind, "run", lambda self: self.close())
    resolve = waitress.adjustments.socket.getaddrinfo

    def two(host, *rest, **kwargs):
        return [a for name in ("127.0.0.1", "127.0.0.2") for a in resolve(name, *rest, **kwargs)]

    with monkeypatch.context() as patch:
        patch.setattr(waitress.adjustments.socket, "getaddrinfo", two)
        user_study.serve(app, arguments(tmp_path, host="localhost", port=0))
    assert re.match(r"the study is at http://127.0.0.1:\d+ and http://127.0.0.2:\d+; passkey", capsys.readouterr().out)
    server = types.SimpleNamespace(effective_host="::", effective_port=8000, run=lambda: None)
    monkeypatch.setattr(waitress, "create_server", lambda *args, **kwargs: server)
    user_study.serve(app, arguments(tmp_path, host="::"))
    assert capsys.readouterr().out.startswith("the study is at http://[::]:8000; passkey")


# -------------------------------------------------------------------------- over a socket
class Participant:
    """A browser without a screen, over HTTP; `sent` holds (method, image, fake) of all that was answered."""

    def __init__(self, port, seed):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.rng, self.cookie, self.sent, self.seconds = np.random.default_rng(seed), "", [], []

    def request(self, method, body=None, path="/"):
        headers = {"Cookie": self.cookie}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        begin = time.perf_counter()
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        self.seconds.append(time.perf_counter() - begin)
        self.cookie = (answer.getheader("Set-Cookie") or self.cookie).split(";")[0]
        return answer.status, text

    def take_part(self, pause=0.0):
        assert self.request("POST", f"start={start_token(self.request('GET')[1])}")[0] == 303
        while True:
            html = self.request("GET")[1]
            if "Thank you" in html:
                return
            page = Page(html)
            marked = {name: bool(self.rng.random() < 0.4) for name, _ in page.images}
            time.sleep(pause * self.rng.uniform(0.5, 1.5))
            body = urllib.parse.urlencode(page.form(n for n, m in marked.items() if m), doseq=True)
            if self.request("POST", body)[0] == 303:
                self.sent += [(*shown, int(marked[name])) for name, shown in page.shown().items()]


def test_fifty_participants(tmp_path):
    """All at once, a page in about two seconds: every vote is there once, and nobody waits."""
    app, study = make_app(tmp_path)
    with served(app) as port:
        people = [Participant(port, seed) for seed in range(50)]
        threads = [threading.Thread(target=p.take_part, args=(2.0,)) for p in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(votes(study)) == sorted(vote for p in people for vote in p.sent)
    rows, summary = user_study.tally(study.args.db)
    assert summary.startswith("50 participants, 1,500 votes") and {r["votes"] for r in rows[:3]} == {500}
    p95 = np.quantile(np.concatenate([p.seconds for p in people]), 0.95)
    assert p95 < 3, p95  # 0.1 on a machine that does nothing else


def test_kill(tmp_path):
    """kill -9 while pages come in: all that was answered is there, and the same study goes on."""
    for name in ("real", "dcgan", "mmgan rbf"):
        images = make_data.pictures(100, 8, channels=1)
        images[:, 0, 0, 0] = METHODS.index(name)
        images[:, 0, 1, 0] = np.arange(100)
        np.save(tmp_path / f"{name}.npy", images)
    people = []
    for _ in range(2):
        fakes = [["--fake", f"{name}={tmp_path / name}.npy"] for name in METHODS[1:]]
        server = launcher.Process("user_study.py", "--real", tmp_path / "real.npy", "--db", tmp_path / "study.db",
                                  "--port", 0, *sum(fakes, []))
        while not (found := re.search(r"127\.0\.0\.1:(\d+);", server.read("out"))):
            assert server.poll() is None, server.read("err")
            time.sleep(0.05)
        port = int(found[1])

        def crowd(seed, port=port):
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    people.append(Participant(port, seed))
                    people[-1].take_part()

        threads = [threading.Thread(target=crowd, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        server.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
        server.communicate()
    sent = collections.Counter(vote for p in people for vote in p.sent)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as db:
        kept = collections.Counter(db.execute("SELECT method, image, fake FROM showings WHERE fake IS NOT NULL"))
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        half = db.execute("SELECT COUNT(*) FROM showings GROUP BY page HAVING COUNT(fake) NOT IN (0, COUNT(*))")
        assert not half.fetchall()
    assert sent and sent <= kept and (kept - sent).total() <= 2 * 4 * 9  # stored, but killed before the answer


# ---------------------------------------------------------------------------------- tally
@pytest.mark.parametrize("mean, concentration", [(0.05, 1), (0.1, 2), (0.35, 8), (0.5, 2), (0.75, 30)])
@pytest.mark.parametrize("people", [10, 20, 50])
def test_interval_covers(people, mean, concentration):
    """About 95% of studies, whose participants differ in how often they call an image fake."""
    rng = np.random.default_rng(people)
    shares = rng.beta(mean * concentration, (1 - mean) * concentration, (1000, people))
    shown = rng.choice([5, 10], (1000, people), p=[0.1, 0.9])
    marked = rng.binomial(shown, shares)
    low, high = np.array([user_study.interval(m, s) for m, s in zip(marked, shown)]).T
    assert 0.92 <= np.mean((low <= mean) & (mean <= high)) <= 0.985
    assert (0 <= low).all() and (low < high).all() and (high <= 1).all()


def test_interval_of_equal_votes():
    """Votes that all agree, or participants who do: no certainty."""
    for people in range(10, 40):
        shown = np.full(people, 10)
        for marked in (0 * shown, shown, shown // 2):
            low, high = user_study.interval(marked, shown)
            share = marked.sum() / shown.sum()
            assert low <= share <= high and 0.03 < high - low < 0.4, people


def test_tally(tmp_path, capsys, monkeypatch):
    app, study = make_app(tmp_path)
    with served(app) as port:
        people = [Participant(port, seed) for seed in range(10)]
        for person in people:
            person.take_part()
    monkeypatch.setattr(sys, "argv", ["user_study.py", "--tally", study.args.db, "--csv", str(tmp_path / "table.csv"),
                                      "--chart", str(tmp_path / "chart.png")])
    assert user_study.main() == 0
    lines = capsys.readouterr().out.splitlines()
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == [*METHODS, "mmgan exp", "mmgan no rg"]
    for method, line, row in zip(METHODS, lines[1:], rows):
        marked = [fake for p in people for name, _, fake in p.sent if name == method]
        assert float(row["share"]) == np.mean(marked) and row["votes"] == str(len(marked)) == "100"
        assert float(row["low"]) <= float(row["share"]) <= float(row["high"])
        assert max(len(row[key]) for key in ("share", "low", "high", "paper_mnist", "paper_celeba")) <= len("0.1234")
        assert f"{100 * np.mean(marked):.1f}%" in line and line.split()[-2:] == [
            f"{p:.1f}%" for p in user_study.PAPER[method]]
    assert rows[4]["share"] == "" and lines[5].split()[-2:] == ["45.5%", "76.6%"]
    assert lines[6] == "10 participants, 300 votes; not counted: 0 trial runs, 0 unfinished pages"
    assert Image.open(tmp_path / "chart.png").format == "PNG"


@pytest.mark.parametrize("damage, message", [
    ("UPDATE study SET settings = 'null'", "cannot read"), ("UPDATE study SET settings = '{'", "cannot read"),
    ("UPDATE study SET settings = '{\"images\": {\"real\": 3}}'", "cannot read"), ("DELETE FROM study", "cannot read"),
    ("UPDATE showings SET method = x'ff'", "cannot read"), ("DROP TABLE showings", "cannot read"),
    ("DELETE FROM showings WHERE method = 'dcgan'", "")])
def test_an_odd_file(tmp_path, damage, message, recwarn):
    """One line; a method without votes has no share."""
    app, study = make_app(tmp_path)
    browser = app.test_client()
    start(browser)
    browser.post("/", data=Page(browser.get("/").text).form([]))
    with study.db:
        study.db.execute(damage)
    if message:
        with pytest.raises(UserError, match=message):
            user_study.tally(study.args.db)
        return
    rows, _ = user_study.tally(study.args.db)
    assert re.search(r"^dcgan +- +- +1 +0 ", user_study.table(rows), re.MULTILINE) and not recwarn.list
    rows[0]["method"] = "$\\frac$ " + 90 * "long"  # no mathematics
    user_study.draw_chart(tmp_path / "chart.png", rows)
    assert not recwarn.list


def test_errors(tmp_path):
    """One line, exit status 2, no traceback; no file is left where there was none."""
    (tmp_path / "text.db").write_text("a text that is longer than SQLite's header of a hundred bytes" * 2)
    make_app(tmp_path)
    np.save(tmp_path / "a.npy", make_data.pictures(20, 8))
    images = ["--real", "a.npy", "--fake", "dcgan=a.npy"]
    for flags, message in ((["--tally", "absent.db"], "cannot read absent.db"), ([], "give --real SOURCE"),
                           (["--tally", "text.db"], "not a database"), (["--tally", "study.db"], "no votes yet"),
                           (["--tally", "study.db", "--csv", "./study.db"], "--csv ./study.db is the study"),
                           (["--tally", "study.db", "--chart", "x.xyz"], "--chart x.xyz: its name ends in .png"),
                           ([*images, "--db", "text.db"], "cannot keep votes in text.db"),
                           ([*images, "--per-method", "3"], "--per-method is 3: it must be in \\[4, inf\\)")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=message) as error:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["user_study.py", *flags])
            user_study.main()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "absent.db").exists()
    _, err = launcher.run("user_study.py", status=2)
    assert err.count("\n") == 1 and err.startswith("user_study.py: error: give --real SOURCE")


# -------------------------------------------------------------------------------- browser
@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.parametrize("width", [390, 1280])
def test_browser(tmp_path, browser, width):
    """Votes by mouse on the first page, by keyboard on the second; the tally is what was voted."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector):
        return browser.find_elements("css selector", selector)

    def focused(script):
        return browser.execute_script(f"return document.activeElement{script}")

    def go(send, there):
        """Do what leads to another page, and wait until that one shows."""
        send()
        loaded = "return document.readyState === 'complete' && document.body.innerText.includes(arguments[0])"
        WebDriverWait(browser, 30, 0.1, [WebDriverException]).until(lambda _: browser.execute_script(loaded, there))

    def keys(*pressed):
        ActionChains(browser).send_keys(*pressed).perform()

    app, study = make_app(tmp_path, per_method=6, pages=2)
    expected = collections.Counter()
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500})
    if browser.current_url.startswith("http"):
        browser.delete_all_cookies()
    with served(app) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        go(find("button")[0].click, "Page 1 of 2")
        for number in range(2):
            page = Page(browser.page_source.replace("&amp;", "&"))
            boxes = find("input[type=checkbox]")
            assert len(boxes) == 9 and browser.execute_script("return document.documentElement.scrollWidth") <= width
            rows = collections.Counter(image.location["y"] for image in find(".image"))
            assert list(rows.values()) == ([5, 4] if width > 1000 else [3, 3, 3])  # no image stands alone
            image = find("img")[0]
            assert image.value_of_css_property("image-rendering") == "pixelated" and image.size["width"] == 112
            assert boxes[3].accessible_name.startswith("image 4 of 9") and boxes[3].aria_role == "checkbox"
            marked = [1, 4, 5] if number else [0, 2, 8]
            if number == 0:
                for i in [*marked, 7, 7]:  # changed one's mind about 7
                    find(".image")[i].click()
            else:
                for i in range(9):
                    keys(Keys.TAB, *([Keys.SPACE] if i in marked else [Keys.SPACE, Keys.SPACE] if i == 7 else []))
                    assert focused(".value") == page.images[i][0]
                assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
                keys(Keys.ENTER)  # on an image: nothing
                keys(Keys.TAB)
                assert "Page 2 of 2" in find("main")[0].text and focused(".tagName") == "BUTTON"
            assert [i for i, box in enumerate(boxes) if box.is_selected()] == marked
            expected.update((*shown, int(i in marked)) for i, shown in enumerate(page.shown().values()))
            go((lambda: keys(Keys.ENTER)) if number else find("form > button")[-1].click,
               "Thank you" if number else "Page 2 of 2")
        assert "of 18 images" in find("main")[0].text
    assert collections.Counter(votes(study)) == expected
    rows, _ = user_study.tally(study.args.db)
    for row in rows[:3]:
        marked = [n for (method, _, fake), n in expected.items() if fake and method == row["method"]]
        assert row["share"] == sum(marked) / 6 and row["votes"] == 6
