"""Renders lake.png, the picture of the example `image`: a mountain lake at dusk that
never was. Needs numpy and Pillow."""
import sys

import numpy as np
from PIL import Image

W, H, S = 360, 240, 3  # pixels, and how many rays a side each is the mean of
w, h = W * S, H * S
rng = np.random.default_rng(7)


def noise(shape, cells, seed):
    """Smooth noise from 0 to 1: values of a lattice, interpolated."""
    g = np.random.default_rng(seed).random((cells[0] + 2, cells[1] + 2))
    y, x = np.linspace(0, cells[0], shape[0]), np.linspace(0, cells[1], shape[1])
    i, j = y.astype(int), x.astype(int)
    smooth = lambda t: t * t * t * (t * (6 * t - 15) + 10)
    u, v = smooth(y - i)[:, None], smooth(x - j)[None]
    at = lambda a, b: g[i + a][:, j + b]
    return (at(0, 0) * (1 - u) + at(1, 0) * u) * (1 - v) + (at(0, 1) * (1 - u) + at(1, 1) * u) * v


def fractal(shape, cells, octaves, seed, gain=0.5):
    total, size = np.zeros(shape), 0.0
    for o in range(octaves):
        total += gain**o * noise(shape, (cells[0] << o, cells[1] << o), seed + o)
        size += gain**o
    return total / size


def mix(a, b, t):
    t = np.clip(t, 0, 1)[..., None]
    return np.asarray(a) * (1 - t) + np.asarray(b) * t


yy, xx = np.mgrid[0:h, 0:w] / (h - 1.0)
horizon = 0.60
# Sky: from night to the glow of a sun that has just gone.
t = yy / horizon
sky = mix([0.10, 0.16, 0.36], [0.40, 0.42, 0.62], t * 1.2)
sky = mix(sky, [0.98, 0.62, 0.36], np.clip(t - 0.35, 0, 1) ** 1.6 * 1.5)
sun = np.array([0.96, 0.545])
glow = np.exp(-(((xx - sun[0]) / 0.42) ** 2 + ((yy - sun[1]) / 0.22) ** 2))
sky = mix(sky, [1.0, 0.83, 0.52], glow * 0.85)
clouds = fractal((h, w), (7, 4), 6, 11) + 0.35 * fractal((h, w), (3, 2), 3, 40) - 0.17
streak = np.clip((clouds - 0.50) * 4.2, 0, 1) * np.clip(1.15 - t, 0, 1) ** 0.4
lit = np.clip(fractal((h, w), (7, 4), 6, 11)[:, :] - np.roll(clouds, S * 4, 0) * 0.9 + 0.2, 0, 1)
sky = mix(sky, mix([0.52, 0.36, 0.46], [1.0, 0.70, 0.58], lit * 2.2), streak * 0.85)
stars = rng.random((h // S, w // S)) > 0.9985
stars = np.kron(stars, np.ones((S, S))) * np.clip(0.30 - yy, 0, 1) * (1 - streak)
scene = np.clip(sky + stars[..., None] * 1.5, 0, 1)

# Ridges, the farther the paler; snow where the nearest high one is steep to the light.
x1 = np.linspace(0, 1.5, w)


def ridge(base, height, cells, octaves, seed):
    return base - height * (fractal((2, w), (1, cells), octaves, seed, 0.52)[0] - 0.35)


def peak(at, wide, high):
    return high * np.clip(1 - np.abs(x1 - at) / wide, 0, 1) ** 1.15


for base, height, cells, seed, colour, haze in [
    (0.545, 0.20, 5, 100, [0.44, 0.43, 0.58], 0.55),
    (0.60, 0.26, 4, 200, [0.30, 0.30, 0.44], 0.30),
    (0.625, 0.17, 6, 300, [0.13, 0.19, 0.22], 0.10),
]:
    top = ridge(base, height, cells, 8, seed)
    if seed == 200:
        top = top - peak(0.47, 0.36, 0.27) - peak(0.86, 0.25, 0.13)
    inside = yy > top[None]
    wide = np.ones(S * 14) / (S * 14)
    slope = np.gradient(np.convolve(np.pad(top, S * 7, "edge"), wide, "same")[S * 7 : -S * 7], x1)
    # Gullies run down from the crest and lean away from it.
    rough = fractal((h, w), (14, 26), 6, seed + 50)
    gully = fractal((h, w), (4, 60), 3, seed + 70)
    lean = np.clip((xx - slope[None] * (yy - top[None]) * 0.7) * (h - 1), 0, w - 1).astype(int)
    gully = np.take_along_axis(gully, lean, 1)
    light = np.clip(0.42 + 0.40 * slope[None] + (rough - 0.5) * 1.3 + (gully - 0.5) * 0.8, 0, 1)
    body = mix(np.array(colour) * 0.62, np.array(colour) * 1.25 + [0.08, 0.03, 0.0], light)
    if seed == 200:
        depth = yy - top[None]
        line = 0.435 + 0.12 * (fractal((h, w), (10, 16), 5, 250) - 0.5) + 0.16 * (gully - 0.5)
        snow = np.clip((line - yy) * 26, 0, 1) * np.clip(depth * 90, 0.4, 1)
        bare = np.clip((rough - 0.56) * 9, 0, 1)
        white = mix([0.50, 0.54, 0.74], [1.0, 0.86, 0.78], light * 1.3)
        body = mix(body, white, snow * (1 - 0.8 * bare))
    body = mix(body, [0.86, 0.62, 0.52], haze * np.clip((yy - 0.35) * 3, 0, 1))
    scene = np.where(inside[..., None], body, scene)

# Woods along the shore: a comb of firs.
shore = horizon - 0.028 + 0.014 * fractal((2, w), (1, 9), 4, 400)[0]
woods = np.full(w, 1.0)
for _ in range(230):
    at, tall = rng.random() * 1.5, 0.016 + 0.026 * rng.random() ** 2
    woods = np.minimum(woods, horizon - tall * np.clip(1 - np.abs(x1 - at) / (tall * 0.30), -9, 1))
woods = np.minimum(woods, shore)
green = mix([0.03, 0.07, 0.07], [0.12, 0.19, 0.12], fractal((h, w), (60, 90), 3, 410))
scene = np.where((yy > woods[None])[..., None], green, scene)


def polygon(points):
    """Where a convex outline is."""
    area = sum(a * d - c * b for (a, b), (c, d) in zip(points, points[1:] + points[:1]))
    points, inside = points[:: 1 if area > 0 else -1], np.ones((h, w), bool)
    for (x0, y0), (x1_, y1) in zip(points, points[1:] + points[:1]):
        inside &= (x1_ - x0) * (yy - y0) - (y1 - y0) * (xx - x0) >= 0
    return inside


def paint(where, colour):
    scene[where] = colour if np.ndim(colour) == 1 else colour[where]


# A cabin at the shore, its window lit.
planks = mix([0.20, 0.11, 0.07], [0.34, 0.19, 0.11], (np.sin(yy * 900) * 0.5 + 0.5) * 0.8)
paint(polygon([(0.255, 0.555), (0.335, 0.555), (0.335, 0.602), (0.255, 0.602)]), planks)
paint(polygon([(0.243, 0.557), (0.295, 0.522), (0.347, 0.557)]), [0.10, 0.07, 0.08])
paint(polygon([(0.270, 0.568), (0.288, 0.568), (0.288, 0.586), (0.270, 0.586)]), [1.0, 0.80, 0.35])
paint(polygon([(0.303, 0.568), (0.321, 0.568), (0.321, 0.586), (0.303, 0.586)]), [1.0, 0.76, 0.30])
paint(polygon([(0.316, 0.512), (0.326, 0.512), (0.326, 0.545), (0.316, 0.545)]), [0.16, 0.11, 0.10])

# The lake mirrors what is above, by ripples that grow towards the eye.
near = np.clip((yy - horizon) / (1 - horizon), 0, 1)
ripple = fractal((h, w), (70, 6), 4, 500) - 0.5
up = 2 * horizon - yy + ripple * (0.015 + 0.10 * near)
side = xx + ripple * 0.03 * near
rows = np.clip((up * (h - 1)).astype(int), 0, int(horizon * (h - 1)) - 1)
cols = np.clip((side * (h - 1)).astype(int), 0, w - 1)
water = scene[rows, cols] * (0.86 - 0.30 * near[..., None])
water = mix(water, [0.06, 0.12, 0.20], 0.16 + 0.42 * near)
glitter = np.clip(ripple * 5 - 0.9 + near * 0.2, 0, 1) * np.exp(-(((xx - sun[0]) / 0.20) ** 2))
water = mix(water, [1.0, 0.80, 0.55], glitter * 0.9)
scene = np.where((yy > horizon)[..., None], water, scene)

# A boat with a sail and its reflection.
boat = lambda flip: [
    (polygon([(x, flip(y)) for x, y in outline]), colour)
    for outline, colour in [
        ([(1.035, 0.575), (1.112, 0.690), (1.035, 0.690)], [0.96, 0.93, 0.90]),
        ([(1.028, 0.595), (0.988, 0.690), (1.028, 0.690)], [0.86, 0.30, 0.22]),
        ([(0.975, 0.697), (1.125, 0.697), (1.095, 0.722), (1.000, 0.722)], [0.30, 0.14, 0.10]),
    ]
]
for where, colour in boat(lambda y: 2 * 0.724 - y):
    fade = np.clip(1 - (yy - 0.724) / 0.17, 0, 1) * (0.55 + 0.9 * ripple)
    shifted = np.take_along_axis(where, np.clip((np.arange(w)[None] + ripple * 26 * S).astype(int), 0, w - 1), 1)
    scene = np.where(shifted[..., None], mix(scene, colour, fade * 0.6), scene)
for where, colour in boat(lambda y: y):
    shade = 0.82 + 0.3 * fractal((h, w), (20, 20), 2, 600)
    scene = np.where(where[..., None], np.array(colour) * shade[..., None], scene)
paint((np.abs(xx - 1.0315) < 0.0022) & (yy > 0.560) & (yy < 0.70), [0.25, 0.17, 0.12])

# A fir in front, branch by branch.
trunk, foot, tip = 0.095, 1.04, 0.245
down = np.clip((yy - tip) / (foot - tip), 0, 1)
tiers = 34
saw = (down * tiers) % 1.0
reach = 0.005 + 0.150 * down**0.9 * (0.45 + 0.55 * saw) * (0.75 + 0.5 * fractal((h, w), (tiers * 2, 3), 2, 700))
droop = np.abs(xx - trunk) < reach
needles = fractal((h, w), (150, 190), 3, 720)
fir = droop & (needles > 0.34) & (yy > tip)
bark = mix([0.015, 0.035, 0.035], [0.10, 0.15, 0.09], (needles - 0.4) * 3 + (xx - trunk) * 3)
scene = np.where(fir[..., None], bark, scene)
# Stones of the bank.
bank = 0.955 - 0.03 * fractal((2, w), (1, 7), 4, 800)[0] + 0.10 * np.clip(x1 - 0.45, 0, 9) ** 1.2
stones = fractal((h, w), (40, 50), 4, 820)
scene = np.where((yy > bank[None])[..., None], mix([0.05, 0.05, 0.06], [0.27, 0.23, 0.22], (stones - 0.35) * 2.4), scene)

# A lens: vignette, a little glow, grain.
photo = scene.reshape(H, S, W, S, 3).mean((1, 3))
blur = photo.copy()
for _ in range(10):
    for axis in (0, 1):
        blur = (np.roll(blur, 1, axis) + 2 * blur + np.roll(blur, -1, axis)) / 4
photo = 1 - (1 - photo) * (1 - 0.14 * np.clip(blur - 0.45, 0, 1))
v, u = np.mgrid[-1 : 1 : H * 1j, -1 : 1 : W * 1j]
photo *= (1 - 0.22 * (u * u + v * v) ** 1.2 / 2)[..., None]
photo += rng.normal(0, 0.008, photo.shape[:2])[..., None]
photo = np.clip(photo, 0, 1)
Image.fromarray((photo * 255 + 0.5).astype(np.uint8)).save(sys.argv[1] if len(sys.argv) > 1 else "lake.png", optimize=True)
