//! Attention between tokens of an image, a sequence or a volume that are near
//! each other.
//!
//! | mechanism | a query sees |
//! |---|---|
//! | [`Neighborhood`] | the nearest keys on each axis (NATTEN) |
//! | [`Cascaded`] | its window, with what the head before it made (EfficientViT) |
//! | [`ChannelAttention`] | a channel sees the others by cosines (SparseGSA, MDTA) |
//! | [`Clear`] | the pixels within a radius, and text (CLEAR) |
//! | [`Compressed`] | a token for each cell of pixels (PixArt-Sigma) |
//! | [`Davit`] | a channel sees the channels of its group (DaViT) |
//! | [`Ela`] | the means of its row and of its column, as gates (ELA) |
//! | [`Fit`] | the keys of its group (FIT) |
//! | [`Gaam`] | a feature sees the others of its row, by Gaussians (GAAM) |
//! | [`HaloNet`] | its block and a halo around it |
//! | [`HiLo`] | its window, or the means of all windows |
//! | [`MetaMixer`] | pixels around by kernels, twice (FFNified attention) |
//! | [`Mhdlsa`] | pixels around, by weights that are given |
//! | [`Overlapping`] | a window larger than its own (HAT) |
//! | [`Reversed`] | a token sends to every other one (DependencyViT) |
//! | [`SentenceAttention`] | a channel is weighed by a sentence |
//! | [`ShVit`] | every key, with some channels of the values |
//! | [`TransNext`] | a window, and pooled tokens |
//! | [`Ulsam`] | one map over the pixels for each group of channels (ULSAM) |
//! | [`Vsa`] | points of a window that is moved and scaled |
//! | [`Swin`] | the keys of its window, which may be shifted |
//!
//! # At the borders
//!
//! What lies beyond an image differs from model to model, and trained weights know it:
//!
//! | policy | who has it |
//! |---|---|
//! | windows move inside, as large as ever | [`Neighborhood`] |
//! | windows are cut: fewer keys | [`Clear`], [`TransNext`] |
//! | keys and values of 0, which take a share of the weights | [`HaloNet`], [`Overlapping`], [`Vsa`] |
//! | padding that is projected, so that its keys and values are the biases of the projection | Swin, DaViT, EfficientViT: the caller pads before it projects, and cuts after |
//! | padding that nobody sees | [`Swin`] with [`Padding::Hidden`], [`Neighborhood`] with `extents` or `tokens` |
//! | refused | [`Swin`] by default, and all others whose windows must divide the image |

pub(crate) mod cascaded;
pub(crate) mod channel_attention;
pub(crate) mod clear;
pub(crate) mod davit;
pub(crate) mod dlgsa;
pub(crate) mod ela;
pub(crate) mod fit;
pub(crate) mod gaam;
pub(crate) mod halo;
pub(crate) mod hilo;
pub(crate) mod metamixer;
pub(crate) mod natten;
pub(crate) mod overlapping;
pub(crate) mod pixart;
pub(crate) mod reversed;
pub(crate) mod sentence;
pub(crate) mod shvit;
pub(crate) mod swin;
pub(crate) mod transnext;
pub(crate) mod ulsam;
pub(crate) mod vsa;

pub use crate::input::global::GlobalQkv;
pub use crate::input::pixels::Pixels;
pub use crate::keys::grid::Grid;
pub use cascaded::{Cascaded, CascadedBuilder};
pub use channel_attention::{ChannelAttention, ChannelAttentionBuilder, ChannelQkv};
pub use clear::{Clear, ClearBuilder};
pub use davit::{Davit, DavitBuilder, DavitInput};
pub use dlgsa::{Mhdlsa, MhdlsaBuilder, MhdlsaInput};
pub use ela::{Ela, ElaBuilder};
pub use fit::{Fit, FitBuilder};
pub use gaam::{Gaam, GaamBuilder};
pub use halo::backward::HaloGradients;
pub use halo::{HaloNet, HaloNetBuilder};
pub use hilo::{HiLo, HiLoBuilder};
pub use metamixer::{MetaMixer, MetaMixerBuilder};
pub use natten::{Neighborhood, NeighborhoodBuilder};
pub use overlapping::{Overlapping, OverlappingBuilder};
pub use pixart::{Compressed, CompressedBuilder, Convolved, Sampling};
pub use reversed::{Reversed, ReversedBuilder, ReversedInput};
pub use sentence::{SentenceAttention, SentenceAttentionBuilder, SentenceInput};
pub use shvit::{ShVit, ShVitBuilder};
pub use swin::{Padding, Swin, SwinBuilder};
pub use transnext::{TransNext, TransNextBuilder, TransNextInput};
pub use ulsam::{Ulsam, UlsamBuilder};
pub use vsa::{Vsa, VsaBuilder, VsaInput};

#[cfg(all(feature = "catalog", not(test)))]
pub(crate) mod exhibits {
    pub(crate) use super::cascaded::CascadedExhibit;
    pub(crate) use super::channel_attention::ChannelAttentionExhibit;
    pub(crate) use super::clear::ClearExhibit;
    pub(crate) use super::davit::DavitExhibit;
    pub(crate) use super::dlgsa::MhdlsaExhibit;
    pub(crate) use super::ela::ElaExhibit;
    pub(crate) use super::fit::FitExhibit;
    pub(crate) use super::gaam::GaamExhibit;
    pub(crate) use super::halo::HaloNetExhibit;
    pub(crate) use super::hilo::HiLoExhibit;
    pub(crate) use super::metamixer::MetaMixerExhibit;
    pub(crate) use super::natten::exhibits::{
        AdditionalExhibit, NeighborhoodExhibit, PackedExhibit, PaddedExhibit,
    };
    pub(crate) use super::overlapping::OverlappingExhibit;
    pub(crate) use super::pixart::CompressedExhibit;
    pub(crate) use super::reversed::ReversedExhibit;
    pub(crate) use super::sentence::SentenceExhibit;
    pub(crate) use super::shvit::ShVitExhibit;
    pub(crate) use super::swin::SwinExhibit;
    pub(crate) use super::transnext::TransNextExhibit;
    pub(crate) use super::ulsam::UlsamExhibit;
    pub(crate) use super::vsa::VsaExhibit;
}
