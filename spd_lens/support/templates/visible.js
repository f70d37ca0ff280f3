// Characters that would reorder, hide or end other text are written out; the same as `visible` in pages.py.
const HIDDEN=/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\u{1bca0}-\u{1bca3}\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/gu;
const namedPoint=c=>'<U+'+c.codePointAt(0).toString(16).toUpperCase().padStart(4,'0')+'>';
const plainText=t=>t.replace(HIDDEN,namedPoint).replace(/([\p{Mn}\p{Me}]{3})([\p{Mn}\p{Me}]+)/gu,(_,few,more)=>few+[...more].map(namedPoint).join(''));
