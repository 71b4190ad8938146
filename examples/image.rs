//! Where a pixel looks: the attention map of a place in a picture under several
//! mechanisms, side by side.
//!
//! ```text
//! cargo run --release --example image [-- PICTURE.png] [--at X,Y] [--out FILE]
//! ```
//!
//! No model is behind the maps. A token is a small square of the picture, of which
//! eight numbers are measured: its mean colour (lightness, red against green, yellow
//! against blue), its contrast, the direction of its edges and where it lies. Queries
//! and keys are made of them so that a score is minus half the squared distance of two
//! tokens: softmax attention then weighs by a Gaussian of how alike they are, and the
//! mechanisms differ in nothing but who sees whom.
//!
//! The picture that comes along is a photograph: Chelsea the cat, by Stefan van der Walt,
//! who gave it to the public domain (CC0).

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use attention_kernels::dense::Dense;
use attention_kernels::neighborhood::{Clear, HiLo, Neighborhood, Swin};
use attention_kernels::{Attention, Qkv, Workspace};
use ndarray::{Array1, Array2, Array3, Array4, s};

#[path = "support/program.rs"]
mod program;
use program::Failure;
/// Any of those that take queries, keys and values.
type Mechanism = Box<dyn for<'a> Attention<Qkv<'a, f32>>>;

const USAGE: &str = "\
usage: image [PICTURE.png] [--at X,Y] [--out FILE]

  PICTURE.png     what to look at (default: examples/support/cat.png)
  --at X,Y        the pixel whose map is drawn (default: the cat's left iris, on the right)
  --out FILE      where the maps go, as a PNG (default: target/image.png)";

/// Tokens of a window on each side; pictures are cut to whole windows.
const WINDOW: usize = 12;
/// The most tokens of a picture: every one has a weight for every other here.
const TOKENS: usize = 4096;
/// How far apart two tokens are for a weight of `e^-1/2`, in colour (from 0 to 1),
/// in contrast and edges, and in widths of the picture.
const COLOUR: f32 = 0.07;
const EDGES: f32 = 0.35;
const PLACE: f32 = 0.4;
/// Pixels of the maps for one of the picture.
const ZOOM: usize = 2;

struct Options {
    picture: PathBuf,
    at: Option<[usize; 2]>,
    out: PathBuf,
}

/// `None` where help is asked for.
fn options(mut args: impl Iterator<Item = String>) -> Result<Option<Options>, Failure> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let picture = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/support/cat.png").into();
    let mut options = Options { picture, at: None, out: target.join("image.png") };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--at" => {
                let value = value()?;
                let at = value.split_once(',').and_then(|(x, y)| Some([x.parse().ok()?, y.parse().ok()?]));
                options.at = Some(at.ok_or("--at needs two numbers, X,Y")?);
            }
            "--out" => options.out = value()?.into(),
            "--help" | "-h" => return Ok(None),
            _ if arg.starts_with('-') => return Err(format!("unknown option {arg}").into()),
            _ => options.picture = arg.into(),
        }
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    program::run(USAGE, options(std::env::args().skip(1)), |options| run(options).map(|()| true))
}

fn run(options: &Options) -> Result<(), Failure> {
    let picture = read(&options.picture)?;
    let grid = Tokens::new(&picture)?;
    let [x, y] = options.at.unwrap_or([grid.size()[1] * 67 / 100, grid.size()[0] * 46 / 100]);
    if x >= grid.size()[1] || y >= grid.size()[0] {
        let [height, width] = grid.size();
        return Err(format!("--at {x},{y} lies outside the {width} x {height} pixels of the picture").into());
    }
    let at = y / grid.patch * grid.shape[1] + x / grid.patch;
    let n = grid.shape[0] * grid.shape[1];
    println!("{n} tokens of {0} x {0} pixels; the map is that of pixel {x},{y}\n", grid.patch);

    let (q, k) = queries_and_keys(&grid.features(&picture));
    let colours = grid.colours(&picture).insert_axis(ndarray::Axis(0)).insert_axis(ndarray::Axis(0));
    let units = Array4::from_shape_fn((1, 1, n, n), |(_, _, j, c)| f32::from(u8::from(j == c)));
    let mut panels = vec![("PICTURE", None)];
    let dense = Dense::builder().scale(1.0).build()?;
    let own = Qkv::new(q.slice(s![.., .., at..at + 1, ..]), k.view(), units.view());
    let all: Array1<f32> = dense.forward(own)?.slice(s![0, 0, 0, ..]).to_owned();

    let cell = Array2::from_elem((4, 4), 1.0 / 16.0);
    // Names, what a token sees, and heads.
    let mechanisms: [(&str, &str, usize, Mechanism); 5] = [
        ("DENSE", "every token", 1, Box::new(dense)),
        (
            "NEIGHBORHOOD",
            "the 13 x 13 nearest tokens",
            1,
            Box::new(Neighborhood::builder(&grid.shape, &[WINDOW + 1; 2]).scale(1.0).build()?),
        ),
        (
            "WINDOW",
            "its window of 12 x 12 tokens",
            1,
            Box::new(Swin::builder(grid.shape, [WINDOW; 2]).scale(1.0).build()?),
        ),
        (
            "CLEAR",
            "a disc of radius 8, and means of 4 x 4",
            1,
            Box::new(Clear::builder(grid.shape, 8).pooled(cell).scale(1.0).build()?),
        ),
        (
            "HILO",
            "a window of 4 x 4; means of all of them",
            2,
            Box::new(HiLo::builder(grid.shape, 1).window([4, 4]).scale(1.0).build()?),
        ),
    ];
    println!("mechanism      a token sees                              as dense is   milliseconds");
    for (name, sees, heads, mechanism) in &mechanisms {
        let of_heads = |x: &Array4<f32>| {
            let (_, _, len, dim) = x.dim();
            x.broadcast((1, *heads, len, dim)).expect("as many heads as there are").to_owned()
        };
        let (q, k, colours) = (of_heads(&q), of_heads(&k), of_heads(&colours));
        let x = Qkv::new(q.view(), k.view(), colours.view());
        let mut workspace = Workspace::with_capacity(mechanism.workspace_bytes(x.reborrow())?);
        let (mut out, mut times) = (Array4::zeros((1, *heads, n, 3)), Vec::new());
        for _ in 0..5 {
            let start = Instant::now();
            mechanism.forward_into(x.reborrow(), out.view_mut(), &mut workspace)?;
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let map = if *name == "DENSE" {
            all.clone()
        } else {
            // Values that are unit vectors: outputs are weights.
            let units = units.broadcast((1, *heads, n, n)).ok_or("no room for the heads")?;
            let weights = mechanism.forward(Qkv::new(q.view(), k.view(), units))?;
            weights.slice(s![0, .., at, ..]).mean_axis(ndarray::Axis(0)).ok_or("no heads")?
        };
        let alike: f32 = map.iter().zip(&all).map(|(a, b)| a.min(*b)).sum();
        println!("{name:14} {sees:41} {:>9.1} % {:>14.2}", 100.0 * alike, times[2]);
        panels.push((name, Some(map)));
    }
    if let Some(folder) = options.out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    write(&options.out, &page(&picture, &grid, [y, x], &panels))?;
    println!("\nthe maps: {}", options.out.display());
    Ok(())
}

/// Rows so that `q . k` is minus half the squared distance of two rows, but for what
/// is the same for every key.
fn queries_and_keys(features: &Array2<f32>) -> (Array4<f32>, Array4<f32>) {
    let (n, dim) = features.dim();
    let q = Array4::from_shape_fn(
        (1, 1, n, dim + 1),
        |(_, _, i, c)| if c < dim { features[[i, c]] } else { 1.0 },
    );
    let half = |i: usize| features.row(i).iter().map(|x| x * x).sum::<f32>() / 2.0;
    let k = Array4::from_shape_fn(q.dim(), |(_, _, i, c)| if c < dim { features[[i, c]] } else { -half(i) });
    (q, k)
}

/// How a picture is cut into tokens.
struct Tokens {
    /// Pixels of a side of a token.
    patch: usize,
    /// Rows and columns of tokens.
    shape: [usize; 2],
}

impl Tokens {
    fn new(picture: &Array3<f32>) -> Result<Self, Failure> {
        let (height, width, _) = picture.dim();
        let cut = |patch: usize| [height, width].map(|size| size / patch / WINDOW * WINDOW);
        let fits = |patch: &usize| cut(*patch).iter().product::<usize>() <= TOKENS;
        let patch = (1..).find(fits).unwrap_or(1);
        // A neighborhood is a token wider than a window.
        if cut(patch).iter().any(|&size| size <= WINDOW) {
            return Err(format!("a picture of {width} x {height} pixels is too small, or too narrow").into());
        }
        Ok(Self { patch, shape: cut(patch) })
    }

    /// Rows and columns of pixels.
    fn size(&self) -> [usize; 2] {
        self.shape.map(|tokens| tokens * self.patch)
    }

    /// For each token a sum over its pixels.
    fn sums<const N: usize>(&self, of: impl Fn(usize, usize) -> [f32; N]) -> Array2<f32> {
        let mut sums = Array2::zeros((self.shape[0] * self.shape[1], N));
        let [height, width] = self.size();
        for (y, x) in ndarray::indices((height, width)) {
            let token = y / self.patch * self.shape[1] + x / self.patch;
            sums.row_mut(token).iter_mut().zip(of(y, x)).for_each(|(sum, x)| *sum += x);
        }
        sums
    }

    /// Mean colours.
    fn colours(&self, picture: &Array3<f32>) -> Array2<f32> {
        let pixels = (self.patch * self.patch) as f32;
        self.sums(|y, x| [0, 1, 2].map(|c| picture[[y, x, c]])) / pixels
    }

    /// What is measured of tokens, in units of what tells two of them apart.
    fn features(&self, picture: &Array3<f32>) -> Array2<f32> {
        let [height, width] = self.size();
        let light = |y: usize, x: usize| picture.slice(s![y, x, ..]).sum() / 3.0;
        // The tensor of the slopes: how steep, and the doubled angle of where to.
        let slopes = self.sums(|y, x| {
            let dy = light((y + 1).min(height - 1), x) - light(y.saturating_sub(1), x);
            let dx = light(y, (x + 1).min(width - 1)) - light(y, x.saturating_sub(1));
            [dx * dx + dy * dy, dx * dx - dy * dy, 2.0 * dx * dy]
        });
        let (colours, pixels) = (self.colours(picture), (self.patch * self.patch) as f32);
        Array2::from_shape_fn((colours.dim().0, 8), |(token, c)| {
            let (colour, slope) = (colours.row(token), slopes.row(token));
            let contrast = (slope[0] / pixels).sqrt() * 8.0;
            let place =
                [token / self.shape[1], token % self.shape[1]].map(|at| at as f32 / self.shape[1] as f32);
            match c {
                0 => colour.sum() / 3.0 / COLOUR,
                1 => (colour[0] - colour[1]) / COLOUR,
                2 => ((colour[0] + colour[1]) / 2.0 - colour[2]) / COLOUR,
                3 => contrast.min(1.0) / EDGES,
                4 | 5 => contrast.min(1.0) * slope[c - 3] / (slope[0] + 1e-6) / EDGES,
                _ => place[c - 6] / PLACE,
            }
        })
    }
}

/// What a weight looks like, from 0 to 1: embers.
fn ember(x: f32) -> [f32; 3] {
    [1.9 * x.powf(0.8), 1.25 * x * x + 0.15 * x, x.powi(5) + 0.25 * x * (1.0 - x)].map(|c| c.clamp(0.0, 1.0))
}

/// All panels, three a row, each with its name above.
fn page(
    picture: &Array3<f32>,
    grid: &Tokens,
    marked: [usize; 2],
    panels: &[(&str, Option<Array1<f32>>)],
) -> Array3<f32> {
    const GAP: usize = 10;
    const TITLE: usize = 34;
    let [height, width] = grid.size().map(|size| size * ZOOM);
    let rows = panels.len().div_ceil(3);
    let mut page =
        Array3::from_elem((GAP + rows * (TITLE + height + GAP), GAP + 3 * (width + GAP), 3), 0.075f32);
    for (i, (name, map)) in panels.iter().enumerate() {
        let (top, left) = (GAP + i / 3 * (TITLE + height + GAP), GAP + i % 3 * (width + GAP));
        write_text(&mut page, name, [top + 6, left]);
        let top = top + TITLE;
        let most = map.as_ref().map_or(1.0, |map| map.fold(0f32, |most, &x| most.max(x)));
        for (y, x) in ndarray::indices((height, width)) {
            let (at, patch) = ([y / ZOOM, x / ZOOM], grid.patch);
            let pixel = [0, 1, 2].map(|c| picture[[at[0], at[1], c]]);
            let colour = match map {
                None => pixel,
                Some(map) => {
                    let weight = map[at[0] / patch * grid.shape[1] + at[1] / patch];
                    // What is not seen at all is darker than what is hardly seen.
                    let grey = pixel.iter().sum::<f32>() / 3.0 * if weight > 0.0 { 0.5 } else { 0.16 };
                    let share = (weight / most).powf(0.4);
                    let glow = ember(share);
                    [0, 1, 2].map(|c| grey * (1.0 - share) + glow[c] * (0.35 + 0.65 * share) * share)
                }
            };
            // A frame around the token of the pixel that is marked.
            let apart = |i: usize| {
                let first = marked[i] / patch * patch * ZOOM;
                let at = [y, x][i] + 4;
                (at >= first && at < first + patch * ZOOM + 8)
                    .then(|| (at - first).min(first + patch * ZOOM + 7 - at))
            };
            let framed = apart(0).zip(apart(1)).is_some_and(|(a, b)| (0..2).contains(&a.min(b)));
            let colour = if framed { [0.35, 0.95, 1.0] } else { colour };
            (0..3).for_each(|c| page[[top + y, left + x, c]] = colour[c]);
        }
    }
    page
}

/// Letters of 3 x 5 points: a row is an octal digit.
const LETTERS: [(char, u16); 17] = [
    ('A', 0o25755),
    ('B', 0o65656),
    ('C', 0o34443),
    ('D', 0o65556),
    ('E', 0o74647),
    ('G', 0o34553),
    ('H', 0o55755),
    ('I', 0o72227),
    ('L', 0o44447),
    ('N', 0o65555),
    ('O', 0o25552),
    ('P', 0o65644),
    ('R', 0o65655),
    ('S', 0o34216),
    ('T', 0o72222),
    ('U', 0o55557),
    ('W', 0o55575),
];

fn write_text(page: &mut Array3<f32>, text: &str, [top, left]: [usize; 2]) {
    const POINT: usize = 4;
    for (i, letter) in text.chars().enumerate() {
        let bits = LETTERS.iter().find(|(known, _)| *known == letter).map_or(0, |(_, bits)| *bits);
        for (y, x) in ndarray::indices((5 * POINT, 3 * POINT)) {
            if bits >> (14 - (y / POINT * 3 + x / POINT)) & 1 == 1 {
                page.slice_mut(s![top + y, left + i * 4 * POINT + x, ..]).fill(0.85);
            }
        }
    }
}

/// A picture, `[height, width, 3]` from 0 to 1.
fn read(path: &Path) -> Result<Array3<f32>, Failure> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut decoder = png::Decoder::new(BufReader::new(file));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let mut bytes = vec![0; reader.output_buffer_size().ok_or("a picture of too many pixels")?];
    let info = reader.next_frame(&mut bytes)?;
    let (height, width, channels) = (info.height as usize, info.width as usize, info.color_type.samples());
    let pixels = Array3::from_shape_vec((height, width, channels), bytes[..info.buffer_size()].to_vec())?;
    Ok(Array3::from_shape_fn((height, width, 3), |(y, x, c)| {
        // Grey ones have one channel for all; what is transparent is shown as it is.
        f32::from(pixels[[y, x, if channels < 3 { 0 } else { c }]]) / 255.0
    }))
}

fn write(path: &Path, page: &Array3<f32>) -> Result<(), Failure> {
    let (height, width, _) = page.dim();
    let mut encoder = png::Encoder::new(BufWriter::new(File::create(path)?), width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let bytes: Vec<u8> = page.iter().map(|x| (x.clamp(0.0, 1.0) * 255.0).round() as u8).collect();
    Ok(encoder.write_header()?.write_image_data(&bytes)?)
}
