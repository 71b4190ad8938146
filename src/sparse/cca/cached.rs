//! CCA over caches.

use ndarray::s;

use super::Cca;
use crate::cache::cored::{CoredCache, Cores};
use crate::cache::{Cache, Cached};
use crate::definition::number::Real;
use crate::element::Element;
use crate::error::Result;
use crate::input::Dims;
use crate::stages::pass::{self, Defined, Out, Pass, Pipeline, composite};
use crate::stages::virtuals;

impl Cca {
    /// Cores of the sequences of a cache for so many query heads, none of them merged yet.
    ///
    /// # Errors
    /// More than memory holds.
    pub fn cores_for<C: Cache + ?Sized>(&self, cache: &C, q_heads: usize) -> Result<Cores> {
        let shape = cache.shape();
        Cores::none([cache.lengths().len(), q_heads], [shape.head_dim, shape.value_dim])
    }

    /// Merges the groups of a call's sequences that are complete and not known yet. The
    /// queries are those of the last tokens of the cache, the last token of each of these
    /// groups among them.
    ///
    /// # Errors
    /// Queries and cores that do not fit the cache, or a group whose last query is not there,
    /// before anything is written.
    pub fn extend_cached<Q: Element, C: Cache + ?Sized, O: Element>(
        &self,
        cores: &mut Cores,
        x: Cached<'_, Q, C, O>,
    ) -> Result<()> {
        let (dims, slots, g) = (self.fitting_cached(&x, cores)?, x.slots(), self.group());
        let mut merged = Vec::new();
        for of in (0..dims.batch).map(|i| slots.sequence(&dims, i)) {
            let known = cores.counts()[of.slot];
            let groups = known..(of.keys.len() / g).max(known);
            let rows = self.last_rows(&groups, [of.queries.len(), of.keys.len()])?;
            let rows = of.queries.start + rows.start..of.queries.start + rows.end;
            let q = x.q.slice(s![of.batch..of.batch + 1, .., rows; g, ..]);
            let of_groups = pass::once(|pass| {
                let source = (x.cache.source(), &of);
                let [k, v] = self.merging.run_of(pass, q, source, groups.start * g, &dims)?;
                Ok([k.view().to_owned(), v.view().to_owned()])
            })?;
            merged.push((of.slot, groups, of_groups));
        }
        cores.reserve(merged.iter().map(|(_, groups, _)| groups.end).max().unwrap_or(0))?;
        for (slot, groups, [k, v]) in merged {
            cores.put(slot..slot + 1, groups, [k.view(), v.view()]);
        }
        Ok(())
    }

    /// Checks a call, and that cores fit the cache.
    fn fitting_cached<Q: Element, C: Cache + ?Sized, O: Element>(
        &self,
        x: &Cached<'_, Q, C, O>,
        cores: &Cores,
    ) -> Result<Dims> {
        let dims = x.dims()?;
        x.check_alike()?;
        cores.fit([x.cache.lengths().len(), dims.q_heads], [dims.head_dim, dims.value_dim])?;
        Ok(dims)
    }

    /// The same, and that all cores are there which the queries see.
    fn seeing<Q: Element, C: Cache + ?Sized, O: Element>(&self, x: &CoredCache<'_, Q, C, O>) -> Result<Dims> {
        let (dims, slots) = (self.fitting_cached(&x.cached, x.cores)?, x.cached.slots());
        for slot in (0..dims.batch).map(|i| slots.slot(i)) {
            self.enough(x.cores.counts()[slot], slots.lengths[slot])?;
        }
        Ok(dims)
    }
}

impl<Q: Element, C: Cache + ?Sized, O: Element> Pipeline<CoredCache<'_, Q, C, O>> for Cca {
    type State = ();

    fn flow(
        &self,
        x: CoredCache<'_, Q, C, O>,
        _: Option<&mut ()>,
        pass: &mut Pass<'_>,
        out: Out<'_, O>,
    ) -> Result<()> {
        self.seeing(&x)?;
        virtuals::attend_cached(&self.near, pass, x.cached, x.cores.views(), self.sight(), out)
    }

    fn define<R: Real>(&self, x: CoredCache<'_, Q, C, O>, _: Option<&()>) -> Result<Defined<R, ()>> {
        let (dims, cached) = (self.seeing(&x)?, x.cached.reborrow());
        let (held, slots) = (cached.held(&dims), cached.slots());
        let arrays = (&cached.q, [&held.k.view(), &held.v.view()]);
        let slot = |sequence: usize| slots.slot(sequence);
        let cores = Some((x.cores, &slot as &dyn Fn(usize) -> usize));
        Ok((self.define_from(&dims, &held.lengths(&cached), arrays, cores)?, ()))
    }
}
composite!(
    Cca, [Q: Element, C: Cache + ?Sized, O: Element] CoredCache<'_, Q, C, O>
);
