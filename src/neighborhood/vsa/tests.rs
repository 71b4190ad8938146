use super::*;
use crate::attention::Attention;
use crate::neighborhood::Swin;
use crate::testing::arrays::array;
use crate::testing::qkv::{Qkvs, close, held};
use ndarray::Array4;

fn pixels(shape: [usize; 2]) -> Qkvs {
    let n = shape[0] * shape[1];
    Qkvs::new([2, 4, 2, n, n, 10, 7], 1)
}

fn samples(shape: [usize; 2], window: [usize; 2], heads: usize) -> Array4<f32> {
    let windows = Sample { image: shape, window }.windows();
    array(2, (2, heads, windows[0] * windows[1], 4))
}

#[test]
fn kernels_follow_the_definition() {
    for (shape, window) in
        [([8, 12], [4, 4]), ([7, 10], [3, 7]), ([5, 5], [5, 5]), ([1, 9], [1, 2]), ([0, 4], [2, 2])]
    {
        let (x, entries) = (pixels(shape), (2 * window[0] - 1) * (2 * window[1] - 1));
        let vsa = Vsa::builder(shape, window);
        for (vsa, heads) in [(vsa.clone(), 2), (vsa.scale(0.7).bias(array(3, (entries, 4))), 1)] {
            let samples = samples(shape, window, heads);
            held(&vsa.build().unwrap(), VsaInput::new(x.qkv(), samples.view()));
        }
    }
}

#[test]
fn what_does_not_move_is_plain_windows() {
    let (shape, window) = ([6, 8], [3, 4]);
    let (x, table) = (pixels(shape), array(3, (5 * 7, 4)));
    let still = 0.0 * samples(shape, window, 2);
    let vsa = Vsa::builder(shape, window).bias(table.clone()).build().unwrap();
    let swin = Swin::builder(shape, window).bias(table).build().unwrap().reference(x.qkv()).unwrap();
    close(&vsa.reference(VsaInput::new(x.qkv(), still.view())).unwrap(), &swin, 1e-12);
    // Windows of scale -1 have their middle alone, which is a pixel here.
    let (shape, window) = ([3, 6], [3, 3]);
    let (x, mut to_middle) = (pixels(shape), 0.0 * samples(shape, window, 2));
    to_middle.slice_mut(s![.., .., .., 2..]).fill(-1.0);
    let vsa = Vsa::builder(shape, window).build().unwrap();
    let out = vsa.reference(VsaInput::new(x.qkv(), to_middle.view())).unwrap();
    for ((b, h, i, c), out) in out.indexed_iter() {
        let middle = 6 + i % 6 / 3 * 3 + 1;
        assert!((out - f64::from(x.v[[b, h / 2, middle, c]])).abs() < 1e-12);
    }
}

/// An offset of 2 / (W - 1) is a pixel, where the image has one window.
#[test]
fn an_offset_moves_the_window() {
    let (shape, window) = ([1, 5], [1, 5]);
    let x = pixels(shape);
    let mut by = 0.0 * samples(shape, window, 2);
    by.slice_mut(s![.., .., .., 0]).fill(0.5);
    let got = Vsa::builder(shape, window).build().unwrap();
    let got = got.reference(VsaInput::new(x.qkv(), by.view())).unwrap();
    let mut moved = x.clone();
    for (to, from) in [(&mut moved.k, &x.k), (&mut moved.v, &x.v)] {
        to.fill(0.0);
        to.slice_mut(s![.., .., ..4, ..]).assign(&from.slice(s![.., .., 1.., ..]));
    }
    let dense = crate::dense::Dense::builder().build().unwrap().reference(moved.qkv()).unwrap();
    close(&got, &dense, 1e-12);
}

#[test]
fn what_does_not_fit_is_refused() {
    let large = Vsa::builder([4, 4], [5, 2]).build().unwrap_err().to_string();
    assert_eq!(large, "window: expected from 1 to 4 pixels on axis 0, got 5");
    let (x, few) = (pixels([4, 4]), Array4::zeros((2, 2, 3, 4)));
    let vsa = Vsa::builder([4, 4], [2, 2]).build().unwrap();
    let refusal = vsa.forward(VsaInput::new(x.qkv(), few.view())).unwrap_err().to_string();
    let want =
        "samples: expected shape [batch, heads, windows, 4] = [2, 2 or a divisor, 4, 4], got [2, 2, 3, 4]";
    assert_eq!(refusal, want);
}
