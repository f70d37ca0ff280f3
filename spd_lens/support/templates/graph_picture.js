// What is shown as a file: SVG with its styles written in, or PNG drawn from the same elements (a page that lets nothing in
// cannot load its own SVG as an image).
const LOOK=['fill','fill-opacity','stroke','stroke-width','stroke-opacity','stroke-dasharray','opacity','font-family','font-size','font-weight','text-anchor','paint-order'];
const drawn=()=>[...svg.querySelectorAll('path,rect,circle,line,text')].filter(e=>{if(getComputedStyle(e).visibility==='hidden')return false;for(let p=e;p!==svg;p=p.parentNode)if(getComputedStyle(p).display==='none')return false;return true});
function svgText(){const kept=new Set(drawn()),page=getComputedStyle(document.documentElement),w=svg.clientWidth,h=svg.clientHeight;
function copy(e){if(e.nodeType===3)return document.createTextNode(e.textContent);const leaf=/^(path|rect|circle|line|text|title)$/.test(e.tagName);if(leaf&&!kept.has(e)&&e.tagName!=='title')return null;
const c=document.createElementNS(NS,e.tagName);for(const a of e.attributes)if(!/^(class|style|tabindex|role|aria-label|id)$/.test(a.name))c.setAttribute(a.name,a.value);
const s=getComputedStyle(e);(leaf&&e.tagName!=='title'?LOOK:['opacity']).forEach(n=>{const v=s.getPropertyValue(n);if(v&&v!=='normal')c.setAttribute(n,v)});
e.childNodes.forEach(x=>{const y=copy(x);if(y)c.append(y)});return leaf||c.childNodes.length?c:null}
const out=document.createElementNS(NS,'svg');out.setAttribute('viewBox',`0 0 ${w} ${h+34}`);out.setAttribute('width',w);out.setAttribute('height',h+34);
el(out,'rect',{width:w,height:h+34,fill:page.getPropertyValue('--bg').trim()});el(out,'text',{x:12,y:22,'font-size':16,'font-family':'sans-serif',fill:page.getPropertyValue('--fg').trim()},document.title);
const inner=el(out,'g',{transform:'translate(0 34)'});svg.childNodes.forEach(x=>{const y=copy(x);if(y)inner.append(y)});return new XMLSerializer().serializeToString(out)}
function pngCanvas(){const scale=2,w=svg.clientWidth,h=svg.clientHeight+34,canvas=document.createElement('canvas'),x=canvas.getContext('2d'),page=getComputedStyle(document.documentElement);canvas.width=w*scale;canvas.height=h*scale;
x.scale(scale,scale);x.fillStyle=page.getPropertyValue('--bg').trim();x.fillRect(0,0,w,h);x.fillStyle=page.getPropertyValue('--fg').trim();x.font='16px sans-serif';x.fillText(document.title,12,22,w-24);
drawn().forEach(e=>{const s=getComputedStyle(e),m=e.getCTM();let alpha=1;for(let p=e;p!==svg;p=p.parentNode)alpha*=+getComputedStyle(p).opacity;
x.setTransform(scale*m.a,scale*m.b,scale*m.c,scale*m.d,scale*m.e,scale*(m.f+34));const v=n=>parseFloat(getComputedStyle(e)[n]||e.getAttribute(n))||0,a=n=>+e.getAttribute(n)||0;
const paintFill=f=>{if(s.fill!=='none'){x.globalAlpha=alpha*s.fillOpacity;x.fillStyle=s.fill;f()}},paintStroke=f=>{if(s.stroke!=='none'&&parseFloat(s.strokeWidth)){x.globalAlpha=alpha*s.strokeOpacity;x.strokeStyle=s.stroke;x.lineWidth=parseFloat(s.strokeWidth);
x.setLineDash(s.strokeDasharray==='none'?[]:s.strokeDasharray.split(/[ ,]+/).map(parseFloat));f()}};
if(e.tagName==='text'){x.font=`${s.fontWeight} ${s.fontSize} ${s.fontFamily}`;x.textAlign={start:'left',middle:'center',end:'right'}[s.textAnchor];paintStroke(()=>x.strokeText(e.firstChild?e.firstChild.textContent:'',a('x'),a('y')));paintFill(()=>x.fillText(e.firstChild?e.firstChild.textContent:'',a('x'),a('y')));return}
const shape=e.tagName==='path'?new Path2D(e.getAttribute('d')):new Path2D();if(e.tagName==='rect')shape.roundRect(v('x'),v('y'),v('width'),v('height'),v('rx'));
if(e.tagName==='circle')shape.arc(0,0,v('r'),0,7);if(e.tagName==='line'){shape.moveTo(a('x1'),a('y1'));shape.lineTo(a('x2'),a('y2'))}
paintFill(()=>x.fill(shape));paintStroke(()=>x.stroke(shape))});return canvas}
$('svgfile').onclick=()=>save('graph.svg',svgText(),'image/svg+xml');
$('pngfile').onclick=()=>pngCanvas().toBlob(b=>save('graph.png',b,'image/png'));
