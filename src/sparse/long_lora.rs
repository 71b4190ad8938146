//! LongLoRA's shifted sparse attention (S2-Attn) and SinkLoRA's form of it.

use std::ops::Range;

use crate::card::{carded, exhibit};
use crate::error::{Error, Result};
use crate::input::{Dims, Qkv, Site};
use crate::keys::Per;
use crate::mask::{Causal, Mask};
use crate::score::Plain;
use crate::stages::attend::{Config, Options};
use crate::stages::patterned::{Pattern, patterned};

/// The groups as a mask.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    group: usize,
    /// Heads from this one on are shifted.
    shifted: usize,
    heads: usize,
    sinks: usize,
    wrapped: bool,
}

impl Groups {
    fn shift(&self) -> usize {
        self.group.div_ceil(2)
    }

    /// The keys of the group of a position that are at or before it, as ranges:
    /// two where the group wraps.
    fn seen(&self, site: &Site, t: usize) -> [Range<usize>; 2] {
        let (g, s) = (self.group, self.shift());
        if site.head < self.shifted {
            return [t / g * g..t + 1, 0..0];
        }
        if !self.wrapped {
            // Groups start at s, s + g, and so on, the first one at 0.
            let start = if t < s { 0 } else { (t - s) / g * g + s };
            return [start..t + 1, 0..0];
        }
        // Rolled: position r holds what was at (r + s) mod N.
        let n = site.kv_len;
        let r = (t + n - s % n.max(1)) % n.max(1);
        let rolled = r / g * g..r + 1;
        let at = rolled.start + s;
        let end = rolled.end + s;
        [at.min(n)..end.min(n), at.max(n) - n..end.max(n) - n]
    }
}

impl Mask for Groups {
    #[inline(always)]
    fn visible(&self, site: &Site, query: usize, key: usize) -> bool {
        (query + site.kv_len).checked_sub(site.q_len).is_some_and(|t| {
            self.seen(site, t).iter().any(|range| range.contains(&key)) || (key < self.sinks && key <= t)
        })
    }
    #[inline(always)]
    fn hull(&self, site: &Site, queries: Range<usize>) -> Range<usize> {
        if self.wrapped { 0..site.kv_len } else { Causal::new().hull(site, queries) }
    }
    #[inline(always)]
    fn bits(&self, site: &Site, query: usize, first: usize) -> u64 {
        let Some(t) = (query + site.kv_len).checked_sub(site.q_len) else { return 0 };
        let below = |n: usize| match n.saturating_sub(first) {
            n if n >= 64 => u64::MAX,
            n => (1 << n) - 1,
        };
        let [a, b] = self.seen(site, t).map(|range| below(range.end) & !below(range.start));
        a | b | below(self.sinks.min(t + 1))
    }
    fn check(&self, dims: &Dims) -> Result<()> {
        if dims.q_heads != self.heads {
            return Err(Error::value("q", format!("{} heads", self.heads), dims.q_heads));
        }
        if !self.wrapped {
            return Ok(());
        }
        if dims.packed {
            return Err(Error::packed("wrapped"));
        }
        if dims.q_len != dims.kv_len || !dims.kv_len.is_multiple_of(self.group) {
            let expected = format!("as many queries as keys, a multiple of {}", self.group);
            return Err(Error::value("q", expected, format_args!("{} and {}", dims.q_len, dims.kv_len)));
        }
        Ok(())
    }
}

impl Pattern for Groups {
    fn per(&self) -> Per {
        Per::Head
    }

    fn ranges(&self, site: &Site, queries: Range<usize>, visit: &mut dyn FnMut(Range<usize>)) {
        let mut end = 0;
        for t in queries.filter_map(|i| (i + site.kv_len).checked_sub(site.q_len)) {
            self.seen(site, t).into_iter().for_each(&mut *visit);
            end = t + 1;
        }
        visit(0..self.sinks.min(end));
    }
}

/// LongLoRA's shifted sparse attention (S2-Attn) and SinkLoRA's form of it.
///
/// ```text
/// group(i) = floor(i / g)              for the first half of the heads
/// group(i) = floor((i + g - s) / g)    for the others, s = ceil(g / 2)
/// query t sees key j <= t with   group(j) = group(t)   or   j < sinks
/// ```
///
/// Half of the heads have groups that lie half a group later, so that
/// what they know crosses the borders. From "LongLoRA: Efficient Fine-tuning of
/// Long-Context Large Language Models" (arXiv 2309.12307), in the form of its
/// code for packed sequences, where the first shifted group is the shorter one.
/// The plain form rolls the sequence instead, and then the last group holds the
/// start of the sequence behind its end, whose queries see the end of the
/// sequence: [`wrapped`](LongLoraBuilder::wrapped) has that. SinkLoRA (arXiv
/// 2406.05678) returns a share of the shifted heads to the unshifted groups and
/// lets all queries see the first keys.
///
/// Training alone has shifted groups, and generates with dense attention: it runs over
/// arrays.
///
/// Cost: `2 (head_dim + value_dim)` flops a visible pair, half of `g` a query.
///
/// ```
/// use attention_kernels::{Attention, Qkv, sparse::LongLora};
/// use ndarray::Array4;
///
/// let x = Array4::<f32>::ones((1, 4, 400, 32));
/// let x = Qkv::new(x.view(), x.view(), x.view());
/// let plain = LongLora::builder(4, 100).build()?.forward(x)?;
/// let sinks = LongLora::builder(4, 100).sinks(4).returned(0.5).build()?.forward(x)?;
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LongLora {
    config: Config<Groups, Plain>,
}

/// Builds a [`LongLora`].
#[derive(Clone, Debug)]
pub struct LongLoraBuilder {
    groups: Groups,
    returned: f64,
    scale: Option<f32>,
    isa: Option<crate::simd::Isa>,
}

impl LongLora {
    /// Groups of `group` tokens for so many query heads.
    pub fn builder(heads: usize, group: usize) -> LongLoraBuilder {
        let groups = Groups { group, shifted: heads / 2, heads, sinks: 0, wrapped: false };
        LongLoraBuilder { groups, returned: 0.0, scale: None, isa: None }
    }
}

impl LongLoraBuilder {
    /// Keys at the start that every query sees.
    pub fn sinks(mut self, sinks: usize) -> Self {
        self.groups.sinks = sinks;
        self
    }

    /// The share of the shifted heads, the first of them, that are returned to
    /// the unshifted groups: from 0 to 1.
    pub fn returned(self, returned: f64) -> Self {
        Self { returned, ..self }
    }

    /// Shifted groups wrap around the end, as where the sequence is rolled. The
    /// first queries of shifted heads then see the last keys. Takes as many
    /// queries as keys, a multiple of the group.
    pub fn wrapped(mut self) -> Self {
        self.groups.wrapped = true;
        self
    }

    /// The factor of the dot product. Default: `1 / sqrt(head_dim)`.
    pub fn scale(self, scale: f32) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Forces an instruction set. Default: the best one of the CPU, or what
    /// [`ISA_VARIABLE`](crate::ISA_VARIABLE) says.
    pub fn isa(self, isa: crate::simd::Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }

    /// Checks the options.
    ///
    /// # Errors
    /// [`Error::Value`] for a group of 0 tokens, a share outside 0 to 1 or a
    /// scale that is not finite, [`Error::Isa`] for an instruction set that the
    /// CPU lacks.
    pub fn build(self) -> Result<LongLora> {
        let Self { mut groups, returned, scale, isa } = self;
        if groups.group == 0 || groups.group > u32::MAX as usize {
            return Err(Error::value("group", "at least 1 token", groups.group));
        }
        if !(0.0..=1.0).contains(&returned) {
            return Err(Error::value("returned", "a share from 0 to 1", returned));
        }
        groups.shifted += (returned * (groups.heads - groups.shifted) as f64).round() as usize;
        let options = Options { mask: groups, score: Plain, scale, isa };
        Ok(LongLora { config: options.build()? })
    }
}

patterned!(LongLora);

exhibit! {
    LongLoraExhibit of LongLora, "sparse", "LongLoRA, SinkLoRA", "arXiv 2309.12307, 2406.05678";
    "causal in groups of 80, for half of the heads half a group later, and 4 sinks";
    not "for inference: it is a cheap way to fine-tune a dense model";
    tokens false;
    build(x, _) { LongLora::builder(x.q.dim().1, 80).sinks(4) }
    input<'a, T>(x, _) -> Qkv<'a, T> { x }
}
carded!(LongLora, LongLoraExhibit);

#[cfg(test)]
mod tests {
    use ndarray::{Array4, Axis, concatenate, s};

    use super::*;
    use crate::attention::Attention;
    use crate::dense::Dense;
    use crate::mask::mask_fn;
    use crate::sparse::testing::{self, Arrays};

    #[test]
    fn identities() {
        for builder in [
            LongLora::builder(4, 50),
            LongLora::builder(4, 64).sinks(3),
            LongLora::builder(4, 33).sinks(1).returned(0.5),
            LongLora::builder(4, 1),
        ] {
            let lora = builder.build().unwrap();
            testing::chunks_are_the_whole(&lora);
            testing::last_row_is_decoding(&lora);
            testing::never_ahead(&lora);
            testing::exact_scores_give_equal_lists(&lora);
        }
        testing::kept_mass_bounds_the_error(&LongLora::builder(4, 50).build().unwrap(), true);
    }

    #[test]
    fn unshifted_groups_of_everything_are_dense() {
        let x = Arrays::normal([2, 4, 2, 200, 200, 24, 12], 1);
        let all = LongLora::builder(4, 200).returned(1.0).build().unwrap().forward(x.qkv()).unwrap();
        let want = Dense::builder().causal().build().unwrap().forward(x.qkv()).unwrap();
        testing::near("dense", &all, &want);
    }

    #[test]
    fn groups_are_a_mask() {
        let x = Arrays::normal([1, 4, 2, 150, 200, 24, 12], 1);
        let mask = crate::mask::mask_fn_per_head(|site, i, j| {
            let t = i + 50;
            let group = |x: usize| if site.head < 2 { x / 50 } else { (x + 25) / 50 };
            j <= t && (group(t) == group(j) || j < 2)
        });
        let want = Dense::builder().mask(mask).build().unwrap().forward(x.qkv()).unwrap();
        let got = LongLora::builder(4, 50).sinks(2).build().unwrap().forward(x.qkv()).unwrap();
        testing::near("mask", &got, &want);
    }

    /// The shifted heads of the wrapped form are unshifted ones of the rolled
    /// sequence; its first queries see the end.
    #[test]
    fn wrapped_groups_are_those_of_the_rolled_sequence() {
        let mut x = Arrays::normal([1, 4, 2, 200, 200, 24, 12], 2);
        let wrapped = LongLora::builder(4, 50).wrapped().build().unwrap();
        let got = wrapped.forward(x.qkv()).unwrap();
        let roll = |x: &Array4<f32>, by: usize| {
            concatenate(Axis(2), &[x.slice(s![.., .., by.., ..]), x.slice(s![.., .., ..by, ..])]).unwrap()
        };
        let rolled = Arrays { q: roll(&x.q, 25), k: roll(&x.k, 25), v: roll(&x.v, 25) };
        let unshifted = mask_fn(|_, i, j| j <= i && i / 50 == j / 50);
        let want = Dense::builder().mask(unshifted).build().unwrap().forward(rolled.qkv()).unwrap();
        let want = roll(&want, 175);
        testing::near(
            "rolled",
            &got.slice(s![.., 2.., .., ..]).to_owned(),
            &want.slice(s![.., 2.., .., ..]).to_owned(),
        );
        x.v.slice_mut(s![.., .., 199, ..]).fill(7.0);
        let after = wrapped.forward(x.qkv()).unwrap();
        assert_ne!(got.slice(s![.., 2.., 0, ..]), after.slice(s![.., 2.., 0, ..]));
        assert_eq!(got.slice(s![.., ..2, 0, ..]), after.slice(s![.., ..2, 0, ..]));
    }

    #[test]
    fn refusals() {
        let refusal = |builder: LongLoraBuilder| builder.build().unwrap_err().to_string();
        assert!(refusal(LongLora::builder(4, 0)).starts_with("group: "));
        assert!(refusal(LongLora::builder(4, 9).returned(1.5)).starts_with("returned: "));
        let x = Arrays::normal([1, 4, 2, 5, 5, 4, 4], 1);
        let refusal = |lora: LongLora| lora.forward(x.qkv()).unwrap_err().to_string();
        assert!(refusal(LongLora::builder(2, 9).build().unwrap()).starts_with("q: "));
        assert!(refusal(LongLora::builder(4, 3).wrapped().build().unwrap()).starts_with("q: "));
    }
}
