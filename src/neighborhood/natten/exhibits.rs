//! Neighborhood attention in the catalogue.

use ndarray::{Array2, Array4};

use super::Neighborhood;
use crate::card::{Extras, exhibit};
use crate::input::Qkv;
use crate::input::global::GlobalQkv;
use crate::keys::grid::Grid;

exhibit! {
    NeighborhoodExhibit of Neighborhood, "neighborhood", "neighborhood",
        "arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922";
    "the 7 x 7 nearest keys of an image, at a dilation of 2 across";
    not "where tokens must reach across the image in one layer";
    tokens true;
    build(x, _) {
        let shape = Grid::squarest(x.q.dim().2);
        let window = [shape[0].clamp(1, 7), (shape[1] / 2).clamp(1, 7)];
        let dilation = [1, if shape[1] < 2 { 1 } else { 2 }];
        Neighborhood::builder(&shape, &window).dilation(&dilation)
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
exhibit! {
    AdditionalExhibit of Neighborhood, "neighborhood", "neighborhood with additional keys", "arXiv 2504.16922";
    "the 5 x 5 nearest keys of an image and 7 keys beside it, in one softmax";
    not "where what stands beside the image must see it, too: one dense attention over both";
    tokens true;
    build(x, _) {
        let shape = Grid::squarest(x.q.dim().2);
        Neighborhood::builder(&shape, &shape.map(|size| size.clamp(1, 5))).global(7)
    }
    extras(x, field) {
        let (batch, heads, _, dim) = x.k.dim();
        let at = |which: u64, (h, t, c): (usize, usize, usize)| T::from_f32(field.at(which, h, t, c));
        let of = |which: u64, dim| Array4::from_shape_fn((batch, heads, 7, dim), |(_, h, t, c)| at(which, (h, t, c)));
        Extras { keys: of(1, dim), values: of(2, x.v.dim().3), ..Extras::default() }
    }
    input<'a, T>(x, extras) -> GlobalQkv<'a, T> { GlobalQkv::new(x, extras.keys.view(), extras.values.view()) }
}

exhibit! {
    PackedExhibit of Neighborhood, "neighborhood", "neighborhood of packed images", "arXiv 2204.07143";
    "the 5 x 5 nearest keys in each of two images of their own shapes, one after the other";
    not "where images have one shape: the batch axis; where they come padded: extents, without a copy";
    tokens true;
    build(x, _) {
        let n = x.q.dim().2;
        let side = (n / 2).isqrt();
        let shapes = [[side; 2], Grid::squarest(n - side * side)];
        let fits = |axis: usize| {
            let images = shapes.iter().filter(|shape| !shape.contains(&0));
            images.map(|shape| shape[axis]).min().map_or(1, |size| size.min(5))
        };
        Neighborhood::packed(&shapes, &[fits(0), fits(1)])
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}

exhibit! {
    PaddedExhibit of Neighborhood, "neighborhood", "neighborhood of padded images", "arXiv 2204.07143";
    "the 5 x 5 nearest keys of images that fill a part of the array, some keys hidden";
    not "where images of a batch differ much in size: packed images";
    tokens true;
    build(x, _) {
        let (batch, _, n, _) = x.q.dim();
        let shape = Grid::squarest(n);
        let own = shape.map(|size| size - size / 6);
        Neighborhood::builder(&shape, &own.map(|size| size.clamp(1, 5)))
            .extents(&vec![own; batch])
            .tokens(Array2::from_shape_fn((1, n), |(_, token)| token % 11 != 3))
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
