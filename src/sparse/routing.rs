//! Routing Transformer: queries and keys meet in the clusters that want them most.

use std::iter::once;

use ndarray::{Array2, Array3, Array4, ArrayView4, Axis};

use crate::attention::Margins;
use crate::card::{carded, exhibit};
use crate::definition;
use crate::definition::heads::of_heads;
use crate::definition::number::Real;
use crate::element::Element;
use crate::engine::workspace::Workspace;
use crate::error::{Error, Result};
use crate::input::{Dims, Lengths, Qkv, Site};
use crate::keys::TokenLists;
use crate::mask::interval::Interval;
use crate::select::{self, Scheme, Selected, Source};
use crate::stages::arrange::{self, NONE, Picked, Places};
use crate::stages::attend;
use crate::stages::choosing::{Choosing, choosing};
use crate::stages::lay::{LEAST, Lay};
use crate::stages::pass::{self, Out, Pass};
use crate::stages::planned::{check_count, sparse};
use crate::stages::selecting::{Listing, difference};

sparse! {
    /// Routing Transformer: queries and keys meet in the clusters that want them most.
    ///
    /// ```text
    /// x^      = x / |x|                                     for routing alone
    /// Q_c     = the w queries with the largest q^ . mu_c, the lower one of equals
    /// K_c     = the w keys with the largest k^ . mu_c
    /// o_i     = mean over the clusters c with i in Q_c of softmax attention of q_i on K_c
    /// ```
    ///
    /// A token may be in several clusters, or in none: its output is 0 then. From
    /// "Efficient Content-Based Sparse Attention with Routing Transformers" (arXiv
    /// 2003.05997); centroids are learned, or means that follow the tokens. Causal, a query
    /// sees the keys of its clusters up to its position, and there may be none; which
    /// tokens a cluster takes depends on all of them.
    ///
    /// Later tokens change clusters, so a step over a cache is no row of a prompt: it
    /// runs over arrays.
    ///
    /// Cost: `2 head_dim` flops a pair of a token and a centroid, twice, and `2 (head_dim +
    /// value_dim)` for each of `clusters w^2` pairs: with `w = sqrt(len)` and as many
    /// clusters `len^1.5`.
    ///
    /// ```
    /// use attention_kernels::{Attention, Qkv, sparse::Routing};
    /// use ndarray::{Array3, Array4};
    ///
    /// let x = Array4::from_shape_fn((1, 2, 256, 16), |(_, h, i, c)| ((h + i * (c + 3)) as f32).sin());
    /// let centroids = Array3::from_shape_fn((2, 16, 16), |(h, i, c)| ((h + i * (c + 5)) as f32).cos());
    /// let routing = Routing::builder(centroids, 16).causal().build()?;
    /// let out = routing.forward(Qkv::new(x.view(), x.view(), x.view()))?;
    /// # Ok::<(), attention_kernels::Error>(())
    /// ```
    Routing;
    /// Builds a [`Routing`].
    RoutingBuilder, perhaps causal;
    given {
        centroids: Array3<f32>;
        window: usize;
    }
    own {}
    check(this) {
        match this.centroids.iter().find(|x| !x.is_finite()) {
            Some(x) => Err(Error::value("centroids", "finite numbers", x)),
            None => check_count("window", this.window),
        }
    }
}

/// The queries and the keys of each cluster of each head.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    lists: [TokenLists; 2],
    /// The same, each filled up to the longest.
    rows: [Vec<u32>; 2],
    lens: [usize; 2],
    places: Places,
}

impl Routed {
    /// The queries of clusters: list `(sequence, head, cluster)`.
    pub fn queries(&self) -> &TokenLists {
        &self.lists[0]
    }

    /// The keys of clusters.
    pub fn keys(&self) -> &TokenLists {
        &self.lists[1]
    }

    fn of(lists: [TokenLists; 2]) -> Result<Self> {
        let [(of_q, q_len), (of_k, k_len)] = [arrange::padded(&lists[0])?, arrange::padded(&lists[1])?];
        let of = *lists[0].layout();
        let picked = Picked { rows: &of_q, units: of.heads() * of.blocks(), len: q_len };
        let places = Places::of(picked, [of.sequences, of.heads(), of.keys])?;
        Ok(Self { lists, rows: [of_q, of_k], lens: [q_len, k_len], places })
    }
}

impl Routing {
    /// With centroids `[q_heads, clusters, head_dim]`, and clusters of `window` queries
    /// and as many keys.
    pub fn builder(centroids: Array3<f32>, window: usize) -> RoutingBuilder {
        RoutingBuilder::with(centroids, window)
    }

    fn dims<T: Element>(&self, x: &Qkv<'_, T>) -> Result<Dims> {
        let dims = x.dims()?;
        x.lengths.check_full("clusters", "clusters take tokens of whole arrays")?;
        let (heads, clusters, dim) = self.centroids.dim();
        if (heads, dim) != (dims.q_heads, dims.head_dim) {
            let expected =
                format!("[q_heads, clusters, head_dim] = [{}, _, {}]", dims.q_heads, dims.head_dim);
            return Err(Error::shape("centroids", expected, &[heads, clusters, dim]));
        }
        Ok(dims)
    }

    fn scheme(&self) -> Scheme {
        Scheme::top_rows(self.window)
    }

    /// Calls `run` with centroids as queries and rows as keys.
    fn with_outer<R>(
        &self,
        rows: ArrayView4<'_, f32>,
        run: impl FnOnce(Qkv<'_, f32>) -> Result<R>,
    ) -> Result<R> {
        let (heads, clusters, dim) = self.centroids.dim();
        let (shape, q) = ((rows.dim().0, heads, clusters, dim), self.centroids.view().insert_axis(Axis(0)));
        let q = q.broadcast(shape).ok_or_else(|| Error::too_large("centroids", format_args!("{shape:?}")))?;
        run(Qkv::new(q, rows.reborrow(), rows.reborrow()))
    }

    /// The tokens of each cluster.
    fn take<T: Element>(&self, x: ArrayView4<'_, T>) -> Result<TokenLists> {
        let isa = self.config.isa();
        let unit = pass::once(|pass| {
            let mut rows = pass.rows(x.dim())?;
            Lay { unit: true, add: None }.run(pass, isa, x, (&mut rows, 0), |_, _| 1.0)?;
            Ok(rows.view().to_owned())
        })?;
        self.with_outer(unit.view(), |outer| {
            select::select(&Source::new(isa, outer, None)?, &self.scheme(), &mut Workspace::new())?.tokens()
        })
    }

    /// The same by definition.
    fn define_take<T: Element>(&self, x: ArrayView4<'_, T>) -> Result<(TokenLists, Margins)> {
        let (x, scheme) = (x.mapv(Element::to_f64), self.scheme());
        let group = self.centroids.dim().0 / x.dim().1.max(1);
        let length = |b: usize, h: usize, j: usize| {
            (0..x.dim().3).map(|c| x[[b, h, j, c]].powi(2)).sum::<f64>().sqrt()
        };
        let score = |b: usize, h: usize, c: usize, of: std::ops::Range<usize>| {
            let (g, j) = (h / group.max(1), of.start);
            let dot: f64 =
                (0..x.dim().3).map(|i| f64::from(self.centroids[[h, c, i]]) * x[[b, g, j, i]]).sum();
            dot / length(b, g, j).max(f64::from(LEAST))
        };
        self.with_outer(x.mapv(|x| x as f32).view(), |outer| {
            let dims = outer.dims()?;
            let layout = scheme.layout(&dims, &Lengths::Full);
            layout.lists()?;
            let (lists, mut margins) =
                definition::select::select(&scheme, &dims, &Lengths::Full, &layout, score);
            // Of rows whose squares overflow the kernel knows no direction.
            let known = x.iter().all(|x| !(x.abs() > 1e18 && x.is_finite()));
            if !known {
                margins.doubtful.iter_mut().for_each(|list| *list = once(0..dims.kv_len).collect());
            }
            Ok((Selected::of(&scheme, &dims, &Lengths::Full, &lists).tokens()?, margins))
        })
    }

    /// Checks an index, and gives the sizes.
    fn fitting<T: Element>(&self, x: &Qkv<'_, T>, index: &Routed) -> Result<Dims> {
        let dims = self.dims(x)?;
        let want = |n| [dims.batch, dims.q_heads, self.centroids.dim().1, n];
        let got = index.lists.each_ref().map(|lists| {
            let of = lists.layout();
            [of.sequences, of.heads(), of.blocks(), of.keys]
        });
        // Lists of no sequences have no clusters.
        let none = dims.batch == 0 && got.iter().all(|of| of[0] == 0);
        if none || got == [want(dims.q_len), want(dims.kv_len)] {
            return Ok(dims);
        }
        let expected =
            format!("[batch, q_heads, clusters, len] = {:?} and {:?}", want(dims.q_len), want(dims.kv_len));
        Err(Error::value("index", expected, format_args!("{got:?}")))
    }

    /// Whether a query sees a key of its cluster.
    fn sees(&self, dims: &Dims, query: u32, key: u32) -> bool {
        !self.config.mask().causal || key as usize + dims.q_len <= query as usize + dims.kv_len
    }
}

impl<T: Element> Choosing<Qkv<'_, T>> for Routing {
    type Index = Routed;

    fn choose(&self, x: Qkv<'_, T>, _: &mut Workspace) -> Result<Routed> {
        self.dims(&x)?;
        Routed::of([self.take(x.q)?, self.take(x.k)?])
    }

    fn define_choice(&self, x: Qkv<'_, T>) -> Result<(Routed, Margins)> {
        self.dims(&x)?;
        let ((queries, mut margins), (keys, more)) = (self.define_take(x.q)?, self.define_take(x.k)?);
        margins.doubtful.extend(more.doubtful);
        Ok((Routed::of([queries, keys])?, margins))
    }

    fn choice_flops(&self, x: Qkv<'_, T>) -> Result<u64> {
        let (dims, clusters) = (self.dims(&x)?, self.centroids.dim().1 as u64);
        let tokens = (dims.batch * dims.q_heads) as u64 * (dims.q_len as u64 + dims.kv_len as u64);
        Ok(2 * tokens * clusters * dims.head_dim as u64)
    }

    fn differ(a: &Routed, b: &Routed, margins: &Margins) -> Option<String> {
        let queries = a.lists[0].layout().lists().unwrap_or(0).min(margins.doubtful.len());
        let (first, last) = margins.doubtful.split_at(queries);
        [first, last].iter().enumerate().find_map(|(i, doubtful)| {
            difference(&a.lists[i], &b.lists[i], &Margins { doubtful: doubtful.to_vec() })
        })
    }

    fn flow_on(&self, x: Qkv<'_, T>, index: &Routed, pass: &mut Pass<'_>, out: Out<'_, T>) -> Result<()> {
        let (dims, isa) = (self.fitting(&x, index)?, self.config.isa());
        let units = dims.q_heads * self.centroids.dim().1;
        let Routed { rows: [of_q, of_k], lens: [q_len, k_len], places, .. } = index;
        let q = Picked { rows: of_q, units, len: *q_len }.gather(pass, isa, x.q)?;
        let keys = Picked { rows: of_k, units, len: *k_len };
        let (k, v) = (keys.gather(pass, isa, x.k)?, keys.gather(pass, isa, x.v)?);
        let mut rows = pass.rows((dims.batch, units, *q_len, dims.value_dim))?;
        let mask = Interval(|site: &Site, query: usize| {
            let unit = site.batch * units + site.head;
            let (query, keys) = (of_q[unit * q_len + query], &of_k[unit * k_len..][..*k_len]);
            0..keys.partition_point(|&key| key != NONE && self.sees(&dims, query, key))
        });
        let of_clusters = Qkv {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            lengths: Lengths::Full,
            out: std::marker::PhantomData::<f32>,
        };
        self.config.masked(mask).attend(pass, of_clusters, rows.view_mut())?;
        places.means(pass, isa, &rows, out);
        Ok(())
    }

    fn define_on<R: Real>(&self, x: Qkv<'_, T>, index: &Routed) -> Result<Array4<R>> {
        let (dims, scale) = (self.fitting(&x, index)?, self.config.scale(&x.dims()?));
        Ok(of_heads(&dims, &x.lengths, |head| {
            let [q, k, v] = [(&x.q, &head.queries), (&x.k, &head.keys), (&x.v, &head.keys)]
                .map(|(x, rows)| head.rows::<R, T>(x, rows));
            let mut sums = Array2::from_elem((dims.q_len, dims.value_dim), R::of(0.0));
            let mut counts = vec![0.0; dims.q_len];
            for c in 0..self.centroids.dim().1 {
                let [of_q, of_k] = index.lists.each_ref().map(|lists| {
                    let ranges = Listing::list(lists, head.sequence, head.head, c);
                    ranges.into_iter().flatten().collect::<Vec<usize>>()
                });
                let [q, k, v] =
                    [(&q, &of_q), (&k, &of_k), (&v, &of_k)].map(|(x, rows)| x.select(Axis(0), rows));
                let sees =
                    |i: usize, j: usize| self.sees(&dims, of_q[i] as u32, of_k[j] as u32).then_some(0.0);
                let of_cluster = attend::define([&q, &k, &v], scale, sees);
                for (row, &i) in of_cluster.outer_iter().zip(&of_q) {
                    sums.row_mut(i).iter_mut().zip(row).for_each(|(sum, &x)| *sum = *sum + x);
                    counts[i] += 1.0;
                }
            }
            let mean = |(row, &count): (ndarray::ArrayViewMut1<'_, R>, &f64)| {
                row.into_iter().filter(|_| count > 0.0).for_each(|x| *x = *x / R::of(count));
            };
            sums.outer_iter_mut().zip(&counts).for_each(mean);
            sums
        }))
    }
}
choosing!(Routing, Routed, Qkv);

exhibit! {
    RoutingExhibit of Routing, "sparse", "Routing Transformer", "arXiv 2003.05997";
    "for each of 6 centroids the 24 queries and the 24 keys nearest in angle see each other, causal";
    not "where centroids were not learned with the model: tokens in no cluster get 0";
    tokens false;
    build(x, field) {
        let centroids = Array3::from_shape_fn((x.q.dim().1, 6, x.q.dim().3), |(h, c, i)| field.at(3, h, c, i));
        Routing::builder(centroids, 24).causal()
    }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(Routing, RoutingExhibit);

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::attention::{Attention, Selects};
    use crate::dense::Dense;
    use crate::sparse::testing::{self, Arrays};

    fn routing(clusters: usize, window: usize) -> RoutingBuilder {
        let number = |(h, c, i): (usize, usize, usize)| ((h * 5 + c * 7 + i * (c + 3)) % 11) as f32 - 5.0;
        Routing::builder(Array3::from_shape_fn((4, clusters, 16), number), window)
    }

    #[test]
    fn clusters_of_all_tokens_are_dense() {
        for sizes in [[2, 4, 2, 90, 90, 16, 8], [1, 4, 1, 3, 70, 16, 8], [1, 4, 4, 40, 20, 16, 8]] {
            let x = Arrays::normal(sizes, 1);
            for clusters in [1, 5] {
                let all = routing(clusters, 100);
                let want = Dense::builder().build().unwrap().forward(x.qkv()).unwrap();
                testing::near("all", &all.clone().build().unwrap().forward(x.qkv()).unwrap(), &want);
                let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
                testing::near("causal", &all.causal().build().unwrap().forward(x.qkv()).unwrap(), &want);
            }
        }
    }

    /// On its index no row depends on later values; without order tokens may move.
    #[test]
    fn rows_see_no_later_values_and_tokens_may_change_places() {
        let x = Arrays::normal([2, 4, 2, 80, 80, 16, 8], 2);
        let causal = routing(6, 12).causal().build().unwrap();
        let (index, mut later) =
            (causal.select(x.qkv()).unwrap(), Arrays::normal([2, 4, 2, 80, 80, 16, 8], 2));
        later.v.slice_mut(s![.., .., 50.., ..]).fill(f32::NAN);
        let [a, b] = [&x, &later].map(|x| causal.forward_on(x.qkv(), &index).unwrap());
        assert_eq!(a.slice(s![.., .., ..50, ..]), b.slice(s![.., .., ..50, ..]));
        let order: Vec<usize> = (0..80).map(|i| i * 7 % 80).collect();
        let turn = |x: &Array4<f32>| x.select(Axis(2), &order);
        let y = Arrays { q: turn(&x.q), k: turn(&x.k), v: turn(&x.v) };
        let free = routing(6, 12).build().unwrap();
        testing::near("turned", &free.forward(y.qkv()).unwrap(), &turn(&free.forward(x.qkv()).unwrap()));
        assert_eq!(index.queries().keys(1, 3, 5), 12);
    }

    #[test]
    fn refusals() {
        let refusal = |builder: RoutingBuilder| builder.build().unwrap_err().to_string();
        assert_eq!(refusal(routing(3, 0)), "window: expected at least 1, got 0");
        assert!(
            refusal(Routing::builder(Array3::from_elem((1, 1, 1), f32::NAN), 1)).starts_with("centroids: ")
        );
        let (x, y) = (Arrays::normal([1, 4, 1, 5, 9, 16, 4], 1), Arrays::normal([1, 4, 1, 5, 8, 16, 4], 1));
        let routing = routing(3, 4).build().unwrap();
        let index = routing.select(x.qkv()).unwrap();
        assert!(routing.forward_on(y.qkv(), &index).unwrap_err().to_string().starts_with("index: "));
        let other = Arrays::normal([1, 2, 1, 5, 9, 16, 4], 1);
        assert!(routing.forward(other.qkv()).unwrap_err().to_string().starts_with("centroids: "));
        assert!(routing.forward(x.qkv().key_lengths(&[7])).is_err());
    }
}
