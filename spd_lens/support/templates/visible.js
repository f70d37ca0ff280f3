// Characters that would reorder, hide or end other text are written out; the same as `visible` in pages.py.
const HIDDEN=/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u00ad\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
const plainText=t=>t.replace(HIDDEN,c=>'<U+'+c.codePointAt(0).toString(16).toUpperCase().padStart(4,'0')+'>');
