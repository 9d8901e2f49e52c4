"Properties of the geometry on random cameras."
import cv2
import numpy as np
import pytest

from reidlit.geometry import (Camera, epipolar_distance, epipolar_lines, epipoles,
                              fundamental_matrix, triangulate)

SIZE = (640, 360)
DISTS = (None, [-.25, .06, .001, -.002], [.2, .1, -.005, .003, .01],
         [-.2, .05, .002, -.003, .01, .1, .02, .005])


def random_camera(rng, dist=None):
    "A camera 6 to 14 m from the origin, looking roughly at it."
    angle, far = rng.uniform(0, 2*np.pi), rng.uniform(6, 14)
    place = [far*np.cos(angle), far*np.sin(angle), rng.uniform(1, 6)]
    return Camera.look_at(place, rng.normal(0, .5, 3), SIZE,
                          fov=rng.uniform(40, 90), dist=dist)


@pytest.fixture(params=range(8))
def rng(request): return np.random.default_rng(request.param)


@pytest.fixture
def pair(rng): return random_camera(rng), random_camera(rng)


# One camera

@pytest.mark.parametrize('dist', DISTS)
def test_opencv_projects_and_undistorts_alike(rng, dist):
    cam, X = random_camera(rng, dist), rng.normal(0, 1.5, (300, 3))
    x, depth = cam.project(X)
    theirs = cv2.projectPoints(X, cv2.Rodrigues(cam.R)[0], cam.t, cam.K, cam.dist)
    inside = cam.visible(X)
    assert inside.sum() > 20 and (depth[inside] > 0).all()
    np.testing.assert_allclose(x[inside], theirs[0][inside, 0], atol=1e-6)
    opencv = getattr(cv2, 'undistortPointsIter', cv2.undistortPoints)
    x = x[inside]
    theirs = opencv(x[:, None], cam.K, cam.dist, R=None, P=cam.K,
                    criteria=(3, 500, 1e-13))
    np.testing.assert_allclose(cam.undistort(x), theirs[:, 0], atol=1e-6)
    np.testing.assert_allclose(cam.distort(cam.undistort(x)), x, atol=1e-6)


@pytest.mark.parametrize('dist', DISTS)
def test_batches_equal_one_by_one(rng, dist):
    cam, X = random_camera(rng, dist), rng.normal(0, 8, (3, 4, 3))
    x, depth = cam.project(X)
    assert x.shape == (3, 4, 2) and depth.shape == (3, 4)
    pixels = rng.uniform(0, 360, (3, 4, 2))
    for i, j in np.ndindex(3, 4):
        np.testing.assert_allclose(cam.project(X[i, j])[0], x[i, j], atol=1e-9)
        assert cam.visible(X[i, j]) == cam.visible(X)[i, j]
        for f in (cam.undistort, cam.distort, cam.rays, cam.image_to_ground):
            np.testing.assert_allclose(f(pixels[i, j]), f(pixels)[i, j], atol=1e-9)
        np.testing.assert_allclose(cam.ground_to_image(X[i, j, :2]),
                                   cam.ground_to_image(X[..., :2])[i, j], atol=1e-9)


def test_lists_and_float32_are_taken(rng):
    cam, X = random_camera(rng), rng.normal(0, 1, (5, 3)).astype(np.float32)
    a, b = cam.project(X)[0], cam.project(X.tolist())[0]
    assert a.dtype == b.dtype == float
    np.testing.assert_array_equal(a, b)
    small = Camera(cam.K.astype(np.float32), cam.R.astype(np.float32).tolist(),
                   cam.t.astype(np.float32), list(SIZE))
    np.testing.assert_allclose(small.project(X)[0], a, atol=1e-2)
    assert Camera(cam.K, cam.R, cam.t, SIZE).project(np.zeros((0, 3)))[0].shape == (0, 2)


@pytest.mark.parametrize('dist', DISTS)
def test_rays_go_through_the_points(rng, dist):
    cam, X = random_camera(rng, dist), rng.normal(0, 1, (50, 3))
    x, _ = cam.project(X)
    seen = cam.visible(X)
    want = X - cam.center
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(cam.rays(x)[seen], want[seen], atol=1e-9)


@pytest.mark.parametrize('dist', DISTS)
def test_ground_there_and_back(rng, dist):
    cam, z = random_camera(rng, dist), rng.uniform(-1, .5)
    XY = rng.uniform(-2, 2, (40, 2))
    x = cam.ground_to_image(XY, z)
    ok = cam.visible(np.c_[XY, np.full(40, z)])
    np.testing.assert_allclose(cam.image_to_ground(x, z)[ok], XY[ok], atol=1e-8)


def test_points_behind_are_nan_and_not_visible(rng):
    cam = random_camera(rng)
    X = cam.center + rng.normal(size=(100, 3))*5
    x, depth = cam.project(X)
    assert (np.isnan(x).all(-1) == (depth <= 0)).all()
    assert not cam.visible(X)[depth <= 0].any()
    assert np.isnan(cam.project(cam.center)[0]).all()


def test_resize_moves_pixels_with_the_picture(rng):
    cam, X = random_camera(rng, DISTS[1]), rng.normal(0, 1, (30, 3))
    small = cam.resize((160, 270))
    np.testing.assert_allclose((cam.project(X)[0] + .5)*[.25, .75],
                               small.project(X)[0] + .5, atol=1e-9)
    assert (small.visible(X) == cam.visible(X)).all()


K, I = [[500, 0, 320], [0, 500, 180], [0, 0, 1]], np.eye(3)


@pytest.mark.parametrize('kw, word', [
    (dict(K=np.diag([500, 500, 0])), 'K must'), (dict(K=np.diag([0, 500, 1])), 'K must'),
    (dict(K=np.transpose(K)), 'K must'), (dict(K=[[1, 2], [3, 4]]), 'K has shape'),
    (dict(R=-I), 'R is not'), (dict(R=I*1.01), 'R is not'), (dict(R=I[:2]), 'R has shape'),
    (dict(t=np.zeros((3, 1))), 't has shape'), (dict(t=[0, 0, np.nan]), 't is not finite'),
    (dict(size=(640, 0)), 'size must'), (dict(size=(640.5, 2)), 'size must'),
    (dict(size=640), 'size has shape'), (dict(dist=[1, 2, 3]), 'dist has 3'),
    (dict(dist=[np.inf]*4), 'dist is not finite')])
def test_invalid_cameras_are_refused(kw, word):
    with pytest.raises(ValueError, match=word):
        Camera(**{**dict(K=K, R=I, t=[0, 0, 0], size=SIZE), **kw})


# Two cameras

def test_points_fulfil_the_epipolar_equation(rng, pair):
    X = rng.normal(0, 1, (200, 3))
    x1, x2 = (c.project(X)[0] for c in pair)
    F = fundamental_matrix(*pair)
    assert epipolar_distance(x1, x2, F).max() < 1e-6
    assert epipolar_distance(x2, x1, F.T).max() < 1e-6
    swapped = fundamental_matrix(*pair[::-1])
    np.testing.assert_allclose(abs(swapped), abs(F.T), atol=1e-12)
    theirs = cv2.computeCorrespondEpilines(x1[:, None], 1, F)[:, 0]
    np.testing.assert_allclose(epipolar_lines(x1, F), theirs, atol=1e-6)
    assert epipolar_distance(x1[:, None], x2[None, :7], F).shape == (200, 7)


@pytest.mark.parametrize('scale', (1000, 100, 1e-6))
def test_units_do_not_matter(rng, pair, scale):
    other = [Camera(c.K, c.R, c.t*scale, c.size) for c in pair]
    np.testing.assert_allclose(fundamental_matrix(*other), fundamental_matrix(*pair),
                               atol=1e-12)
    X = rng.normal(0, 1, (10, 3))
    x = [c.project(X)[0] + rng.normal(0, 2, (10, 2)) for c in pair]
    np.testing.assert_allclose(triangulate(other, x)[0]/scale, triangulate(pair, x)[0],
                               atol=1e-7)
    same = other[0], Camera(other[1].K, other[1].R, -other[1].R@other[0].center, SIZE)
    with pytest.raises(ValueError, match='both cameras'): fundamental_matrix(*same)
    with pytest.raises(ValueError, match='all cameras'): triangulate(same, x)


def test_epipoles_show_the_other_camera(pair):
    F = fundamental_matrix(*pair)
    e1, e2 = epipoles(F)
    for e, cam, other in zip((e1, e2), pair, pair[::-1]):
        want = cam.P@np.append(other.center, 1)
        assert np.linalg.norm(np.cross(e/np.linalg.norm(e), want/np.linalg.norm(want))) < 1e-9
    if e1[2] and abs(e1).max() < 1e5:
        assert np.isnan(epipolar_lines(e1[:2], F)).all()


def test_opencv_triangulates_alike(rng, pair):
    X = rng.normal(0, 1, (100, 3))
    x = [c.project(X)[0] for c in pair]
    h = cv2.triangulatePoints(*[c.P for c in pair], *[p.T for p in x])
    np.testing.assert_allclose(triangulate(pair, x)[0], (h[:3]/h[3]).T, 1e-6, 1e-6)


def test_triangulation_is_near_least_squares(rng):
    "A long lens far away beside short ones: two pixels of noise, errors against scipy's minimum."
    from scipy.optimize import least_squares
    places = ((6, 0, 3), (0, 6, 3), (-6, 0, 3), (30, 30, 4))
    cams = [Camera.look_at(p, (0, 0, 1), (1920, 1080), focal=f) for p, f in zip(places, (500, 500, 500, 3000))]
    X = rng.normal(0, 1, (200, 3)) + [0, 0, 1]
    x = np.stack([c.project(X)[0] for c in cams]) + rng.normal(0, 2, (4, 200, 2))
    miss = lambda p, i: np.ravel([c.project(p)[0] - q[i] for c, q in zip(cams, x)])
    best = np.stack([least_squares(miss, X[i], args=(i,)).x for i in range(200)])
    got, errors = triangulate(cams, x)
    error = lambda p: np.linalg.norm(p - X, axis=1).mean()
    assert error(got) < 1.02*error(best)
    squares = sum((c.project(best)[0] - q)**2 for c, q in zip(cams, x)).sum()
    assert squares <= (errors**2).sum() < 1.001*squares


@pytest.mark.parametrize('views', (2, 3, 5))
def test_triangulation_is_exact_and_batched(rng, views):
    cams = [random_camera(rng, d) for d in (*DISTS, None)[:views]]
    X = rng.normal(0, .5, (4, 3, 3))
    x = np.stack([c.project(X)[0] for c in cams])
    got, miss = triangulate(cams, x)
    assert got.shape == (4, 3, 3) and miss.shape == (views, 4, 3)
    np.testing.assert_allclose(got, X, atol=1e-6)
    assert miss.max() < 1e-5
    one, _ = triangulate(cams, x[:, 2, 1])
    np.testing.assert_allclose(one, got[2, 1], atol=1e-9)
    far = np.array([5e5, 4e6, 0])  # a map's coordinates
    moved = [Camera(c.K, c.R, c.t - c.R@far, c.size, c.dist) for c in cams]
    np.testing.assert_allclose(triangulate(moved, x)[0] - far, X, atol=1e-5)


def test_points_behind_a_camera_have_infinite_error():
    cams = [Camera(K, I, [0, 0, 0], SIZE), Camera(K, I, [-1, 0, 0], SIZE)]
    X, miss = triangulate(cams, [[100, 100], [200, 100]])  # rays part in front
    assert X[2] < 0 and np.isinf(miss).all()
    X, miss = triangulate(cams, [[200, 100], [np.nan, 100]])
    assert np.isnan(X).all() and np.isnan(miss).all()
    with pytest.raises(ValueError, match='1 cameras'): triangulate(cams[:1], [[1, 2]])


def test_two_cameras_at_one_place_give_no_point(rng):
    a, b = (Camera.look_at(p, (0, 0, 1), (640, 480), fov=60) for p in ((6, 0, 3), (0, 6, 3)))
    twin = Camera.look_at((6, 0, 3), (0, 1, 1), (640, 480), fov=60)
    X = np.array([[.3, .2, 1], [0, 0, .5]])
    x = np.stack([c.project(X)[0] for c in (a, twin, b)])
    x[2, 0] = np.nan
    got, _ = triangulate([a, twin, b], x)
    assert np.isnan(got[0]).all()
    np.testing.assert_allclose(got[1], X[1], atol=1e-9)


def test_strong_lenses_lose_few_pixels(rng):
    "Where Newton's method from the pixel itself does not arrive, other starts do."
    lost = n = 0
    for _ in range(200):
        dist = rng.uniform(-1, 1, 4)*[.7, .3, .004, .004]
        c = Camera.look_at((6, 0, 3), (0, 0, 1), (640, 480), focal=320, dist=dist)
        r = rng.uniform(0, .95, 200)*min(c._limit, 2)
        a = rng.uniform(0, 6.3, 200)
        x = (np.stack([r*np.cos(a), r*np.sin(a)], -1)@c.K[:2, :2].T)+c.K[:2, 2]
        y = c.undistort(c.distort(x))
        ok = ~np.isnan(y[:, 0])
        lost, n = lost+(~ok).sum(), n+len(r)
        np.testing.assert_allclose(c.distort(y[ok]), c.distort(x[ok]), atol=1e-5)
    assert lost/n < .002
