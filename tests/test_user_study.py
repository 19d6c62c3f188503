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
import urllib.parse

import launcher
import make_data
import numpy as np
import pytest
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


def make_app(folder, **changes):
    """A study of grey images 8x8, whose first two pixels are the method's number and the image's."""
    sources = {}
    for i, method in enumerate(METHODS):
        sources[method] = make_data.pictures(100, 8, channels=1)
        sources[method][:, 0, 0, 0] = i
        sources[method][:, 0, 1, 0] = np.arange(100)
    study = user_study.Study(arguments(folder, **changes), {m: len(images) for m, images in sources.items()})
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
    for name in ("grey.npy", idx):
        assert isinstance(user_study.open_images(str(tmp_path / name), ""), np.memmap)


@pytest.mark.parametrize("fake, message", [
    ("dcgan", "write NAME=SOURCE"), ("real=a.npy", "write NAME=SOURCE"), ("=a.npy", "write NAME=SOURCE"),
    ("dcgan=absent.npy", "cannot read absent.npy"), ("dcgan=text", "cannot read text: not an idx3 file"),
    ("dcgan=cut.npy", "cannot read cut.npy"), ("dcgan=float.npy", "float32 [20, 28, 28, 1] is not uint8"),
    ("dcgan=empty", "no images in empty"), ("dcgan=few.npy", "dcgan has 3 images: lower --per-method 10"),
    ("dcgan=small.npy", "those of real are 28x28, those of dcgan 14x14")])
def test_source_errors(tmp_path, monkeypatch, fake, message):
    monkeypatch.chdir(tmp_path)
    images = make_data.pictures(20, 28)
    for name, array in {"a": images, "few": images[:3], "small": images[:, ::2, ::2],
                        "float": images[..., 0].astype(np.float32)}.items():
        np.save(f"{name}.npy", array)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:5000])
    (tmp_path / "text").write_text("a text, not a picture")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(message)):
        user_study.open_sources(user_study.Args(real="a.npy", fake=(fake,)))


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
        browser.post("/start")
        answer = browser.get("/")
        page = Page(answer.text)
        names += [name for name, _ in page.images]
        for _, png in page.images:
            picture = Image.open(io.BytesIO(base64.b64decode(png)))
            assert picture.mode == "RGB" and not picture.info
            lengths.add(len(png))
        assert answer.headers["Cache-Control"] == "no-store" and "ETag" not in answer.headers
        assert not any(method in answer.text for method in METHODS[1:])
    assert len(set(names)) == len(names) == 18 and len(lengths) == 1
    images = [np.zeros((8, 8, 3), np.uint8), make_data.pictures(1, 8)[0], make_data.pictures(1, 8, channels=1)[0]]
    assert {len(user_study.encode(image)) for image in images} == {len(page.images[0][1])}


# ---------------------------------------------------------------------------------- votes
def test_study(tmp_path):
    """A participant goes through; the thank-you page and the tally agree; a trial run is not counted."""
    app, study = make_app(tmp_path, per_method=5, pages=2)
    for key, status in (("0DEE2A", 303), ("", 303), ("wrong", 400)):
        browser = app.test_client()
        assert browser.post("/start", data={"passkey": key}).status_code == status
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
    app.test_client().post("/start")  # who never sends a page
    rows, summary = user_study.tally(study.args.db)
    assert [(r["share"], r["votes"]) for r in rows[:3]] == [(0, 5), (1, 5), (0, 5)]
    assert summary == "1 participants, 15 votes; not counted: 1 trial runs, 2 unfinished pages"


def test_refused_forms(tmp_path):
    """Forms that are cut, forged or of another participant get a 400 and change nothing."""
    app, study = make_app(tmp_path)
    browser, other = app.test_client(), app.test_client()
    for b in (browser, other):
        b.post("/start")
    mine, others = (Page(b.get("/").text) for b in (browser, other))
    names = [name for name, _ in mine.images]
    for form in ({}, {"fake": names}, {"page": ""}, {"page": mine.token[:-1]}, {"page": "x' OR 1=1 --"},
                 {"page": mine.token, "fake": [*names, "forged"]}, {"page": mine.token, "fake": others.images[0][0]},
                 others.form([]), others.form(names), {"page": b"\xff\x00"}, {"page": "0"}):
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
        for header, value in (("Cookie", f"participant={browser.get_cookie('participant').value}"),
                              ("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", len(encoded))):
            connection.putheader(header, str(value))
        connection.endheaders(encoded[:-10].encode())
        connection.close()
    assert votes(study) == []
    assert browser.post("/", data=mine.form(names)).status_code == 303 and len(votes(study)) == len(names)


def test_sent_twice(tmp_path):
    app, study = make_app(tmp_path)
    browser = app.test_client()
    browser.post("/start")
    page = Page(browser.get("/").text)
    for fake in (page.shown(), []):
        assert browser.post("/", data=page.form(fake)).status_code == 303
    assert len(votes(study)) == 9 and all(fake for _, _, fake in votes(study))
    assert Page(browser.get("/").text).token != page.token


def test_limit(tmp_path):
    app, study = make_app(tmp_path, max_participants=2)
    assert [app.test_client().post("/start").status_code for _ in range(3)] == [303, 303, 403]
    assert app.test_client().post("/start", data={"passkey": "0DEE2A"}).status_code == 303
    with pytest.raises(UserError, match="of another study"):
        make_app(tmp_path, pages=2)
    make_app(tmp_path)


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
        assert self.request("POST", "", "/start")[0] == 303
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
    assert p95 < 1, p95  # 0.1 on a machine that does nothing else


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
def slow_share(marked, shown, people, method):
    return sum(marked[p][method] for p in people) / sum(shown[p][method] for p in people)


def test_bootstrap():
    """Against a loop over resamples with draws of its own, with participants whose votes depend on each other."""
    rng = np.random.default_rng(1)
    shown = rng.choice([5, 10], (30, 1)) * np.ones((1, 3), int)
    marked = rng.binomial(shown, rng.beta(1, 2, (30, 1)) * [0.3, 0.9, 1.0])
    draws = rng.integers(30, size=(4000, 30))
    low, high = user_study.bootstrap(marked, shown)
    for method in range(3):
        shares = sorted(slow_share(marked, shown, people, method) for people in draws)
        assert abs(low[method] - shares[100]) < 0.01 and abs(high[method] - shares[3900]) < 0.01
    independent = 2 * 1.96 * np.sqrt(0.3 * 0.7 / shown[:, 1].sum())
    assert high[1] - low[1] > 1.5 * independent  # wider than if all votes were independent
    assert np.array_equal(user_study.bootstrap(marked, shown), [low, high])


def test_tally(tmp_path, capsys, monkeypatch):
    app, study = make_app(tmp_path)
    with served(app) as port:
        people = [Participant(port, seed) for seed in range(6)]
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
        assert float(row["share"]) == np.mean(marked) and row["votes"] == str(len(marked)) == "60"
        assert float(row["low"]) <= float(row["share"]) <= float(row["high"])
        assert f"{100 * np.mean(marked):.1f}%" in line and line.split()[-2:] == [
            f"{p:.1f}%" for p in user_study.PAPER[method]]
    assert rows[4]["share"] == "" and lines[5].split()[-2:] == ["45.5%", "76.6%"]
    assert lines[6] == "6 participants, 180 votes; not counted: 0 trial runs, 0 unfinished pages"
    assert Image.open(tmp_path / "chart.png").format == "PNG"


def test_errors(tmp_path):
    """One line, exit status 2, no traceback; no file is left where there was none."""
    (tmp_path / "text.db").write_text("a text that is longer than SQLite's header of a hundred bytes" * 2)
    make_app(tmp_path)
    np.save(tmp_path / "a.npy", make_data.pictures(20, 8))
    images = ["--real", "a.npy", "--fake", "dcgan=a.npy"]
    for flags, message in ((["--tally", "absent.db"], "cannot read absent.db"), ([], "give --real SOURCE"),
                           (["--tally", "text.db"], "not a database"), (["--tally", "study.db"], "no votes yet"),
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
