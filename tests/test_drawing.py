"Figures of all kinds are sound, whoever is drawn, and agree with the camera's own projection."
import numpy as np
import pytest

from reidlit.data.drawing import BLOCK, KINDS, THINGS, Room, backdrop, dress_all, inside, make_room, place, see, shadow, thing
from reidlit.geometry import Camera

LIGHT = np.array([.3, -.5, .8])
CAMERA = Camera.look_at((9, -12, 4), (0, 0, 1), (320, 240), fov=60)


@pytest.fixture(params=KINDS)
def drawn(request):
    kind = KINDS[request.param]
    looks, albedo, worn = dress_all(range(60), 3, .5, kind.dress)
    return kind, looks, albedo, worn, kind.figure(looks, np.linspace(0, 12, 60))


def test_all_stand_on_the_ground(drawn):
    kind, looks, albedo, worn, V = drawn
    there = np.zeros((60, V.shape[1]), bool)
    for i in range(60): there[i, kind.mesh.corners[worn[i]].ravel()] = True
    z = np.where(there, V[..., 2], np.inf).min(1)
    assert np.isfinite(V).all() and np.abs(z).max() < .06
    top = np.where(there, V[..., 2], -np.inf).max(1)
    assert (top > .93*looks.height).all() and (top < looks.height+1.2).all()
    assert (albedo >= 0).all() and (albedo <= 255).all() and worn.any(1).all()


def test_order_does_not_matter(drawn):
    kind, looks, albedo, worn, V = drawn
    some = dress_all([41, 5], 3, .5, kind.dress)
    assert (some[1] == albedo[[41, 5]]).all() and (some[2] == worn[[41, 5]]).all()
    assert (kind.figure(some[0], np.linspace(0, 12, 60)[[41, 5]]) == V[[41, 5]]).all()


def test_see_agrees_with_project(drawn):
    "Corners lie where the camera projects them; a face is seen if its corners turn one way round in the picture."
    kind, _, albedo, worn, V = drawn
    V = place(V, np.zeros((60, 2)), np.linspace(0, 6, 60))
    key = lambda q: tuple(q.round(5).ravel())
    for i, (points, color) in enumerate(see(V, kind.mesh, albedo, worn, CAMERA, LIGHT)):
        uv = CAMERA.project(V[i])[0][kind.mesh.corners[worn[i]]]
        d, e = uv[:, 3]-uv[:, 1], uv[:, 2]-uv[:, 0]
        turn = d[:, 0]*e[:, 1] - d[:, 1]*e[:, 0]
        front, mine = {key(q) for q in uv[turn < 0]}, {key(q) for q in points}
        assert len(mine ^ front) <= .05*len(mine) and len(points) == len(color)
        assert (color >= 0).all() and (color <= 255).all()


@pytest.mark.parametrize('kind', THINGS)
def test_things_stand_where_they_are_put(kind):
    V, color, radius = thing(kind, 3, -2, .7)
    assert V.shape[1:] == (48, 3) and color.shape == (len(V), len(BLOCK.tube), 3)
    assert np.abs(V[..., 2].min()) < 1e-9 and np.hypot(*(V[..., :2]-[3, -2]).reshape(-1, 2).T).max() < radius+.5


def test_rooms_and_shadows():
    room = make_room((-20, -20, 20, 20), [(0, 20)], 1., 5)
    assert isinstance(room, Room) and inside(room, np.array([CAMERA.center[:2]]))[0]
    floor = backdrop(CAMERA, room)
    looks, *_ = dress_all(range(3), 0)
    V = place(KINDS['people'].figure(looks, np.zeros(3)), np.array([[0, 0], [2, 1], [-2, 3]]), np.zeros(3))
    dark = shadow(floor, V, KINDS['people'].cast, CAMERA, LIGHT)
    changed = (dark != floor).any(-1)
    assert (dark <= floor).all() and .002 < changed.mean() < .2
    none = shadow(floor, V[:0], KINDS['people'].cast, CAMERA, LIGHT)
    assert (none == floor).all()
