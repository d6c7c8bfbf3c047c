//! Rotary position embedding (arXiv 2104.09864). The two halves of a head are the coordinates that
//! are rotated. If there are fewer angles than that, only the first features are rotated, and the
//! rest stays as it is.

use std::mem::MaybeUninit;

use crate::kernels::level::dispatch;

dispatch! {
    /// Rotates one head: `(low cos - high sin, high cos + low sin)`.
    pub(crate) fn rotate<const FMA: bool>(head: &[f32], cos: &[f32], sin: &[f32], out: &mut [MaybeUninit<f32>]) {
        let half = cos.len();
        let ((head, rest), (out, out_rest)) = (head.split_at(2 * half), out.split_at_mut(2 * half));
        out_rest.iter_mut().zip(rest).for_each(|(out, x)| {
            out.write(*x);
        });
        let ((low, high), (out_low, out_high)) = (head.split_at(half), out.split_at_mut(half));
        let rotated = out_low.iter_mut().zip(out_high).zip(low.iter().zip(high)).zip(cos.iter().zip(sin));
        for (((out_low, out_high), (low, high)), (cos, sin)) in rotated {
            out_low.write(low * cos - high * sin);
            out_high.write(high * cos + low * sin);
        }
    }
}

dispatch! {
    /// Rotates a head in place; see [`rotate`].
    pub(crate) fn rotate_in_place<const FMA: bool>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (low, high) = head.split_at_mut(cos.len());
        for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

dispatch! {
    /// Rotates one head back: `(low cos + high sin, high cos - low sin)`.
    pub(crate) fn rotate_back<const FMA: bool>(head: &[f32], cos: &[f32], sin: &[f32], out: &mut [MaybeUninit<f32>]) {
        let half = cos.len();
        let ((head, rest), (out, out_rest)) = (head.split_at(2 * half), out.split_at_mut(2 * half));
        out_rest.iter_mut().zip(rest).for_each(|(out, x)| {
            out.write(*x);
        });
        let ((low, high), (out_low, out_high)) = (head.split_at(half), out.split_at_mut(half));
        let rotated = out_low.iter_mut().zip(out_high).zip(low.iter().zip(high)).zip(cos.iter().zip(sin));
        for (((out_low, out_high), (low, high)), (cos, sin)) in rotated {
            out_low.write(low * cos + high * sin);
            out_high.write(high * cos - low * sin);
        }
    }
}
