// The graph itself: nodes, edges, axis, pan and zoom, and which edges are shown.
const world=el(svg,'g',{id:'world'}),bands=el(world,'g',{}),edgeLayer=el(world,'g',{}),nodeLayer=el(world,'g',{}),subLayer=el(world,'g',{}),fixed=el(svg,'g',{});
used.forEach((r,i)=>{if(i%2)el(bands,'rect',{class:'band',x:-6,y:bottom[i][0],width:total+12,height:height[i]})});
const column=el(bands,'rect',{class:'column off',y:0,height:tall});
start.forEach((x,c)=>{if(c)el(bands,'line',{class:'column',x1:x,x2:x,y1:0,y2:tall})});
const raw=data.edges.map(e=>e.length>3?e[3]:Math.abs(e[2]||0)),sums=data.nodes.map(()=>0);
data.edges.forEach((e,i)=>{sums[e[1]]+=raw[i]});
const shares=data.edges.map((e,i)=>raw[i]/(sums[e[1]]||1)),measures={influence:data.influence,share:shares,size:raw};
if(!data.influence){$('measure').querySelector('[value=influence]').remove()}
// The three edges that act most on each readout are always shown.
const always=new Set();data.nodes.forEach((n,i)=>{if(n.kind==='readout')[...incoming[i]].sort((a,b)=>raw[b]-raw[a]).slice(0,3).forEach(e=>always.add(e))});
const paths=new Map();let strength=shares,order=[],strongest=1,limit=0,chosen=null;const pinned=[],removed=new Set();let groups=[];
function path(i){if(paths.has(i))return paths.get(i);const [s,t,w]=data.edges[i],[x1,y1]=at[s],[x2,y2]=at[t],m=(y1+y2)/2;
const p=el(edgeLayer,'path',{class:'edge '+(w<0?'lowers':'raises'),d:`M${x1} ${y1}C${x1} ${m} ${x2} ${m} ${x2} ${y2}`});paths.set(i,p);return p}
const marks=data.nodes.map((n,i)=>{const g=el(nodeLayer,'g',{class:'node',tabindex:0,role:'button'});
if(n.kind==='readout'){el(g,'rect',{class:'shape readout',x:-56,y:-13,width:112,height:26,rx:5});
el(g,'text',{'text-anchor':'middle',y:4},short(shown(n.predicts===null?n.label:n.predicts),17))}
else if(n.kind==='delta')el(g,'path',{class:'shape delta',d:'M0 -7L7 0L0 7L-7 0Z'});
else if(n.kind==='embedding')el(g,'rect',{class:'shape embedding',x:-6,y:-6,width:12,height:12});
else{el(g,'circle',{class:'shape',r:7.5});el(g,'circle',{class:'inner',r:7,'fill-opacity':n.importance===null?.55:.12+.83*n.importance})}
el(g,'path',{class:'cross',d:'M-7 -7L7 7M7 -7L-7 7'});if(n.kind!=='readout')el(g,'text',{class:'tag',x:11,y:4},'');el(g,'title',{},'');
g.addEventListener('click',e=>{if(e.ctrlKey||e.metaKey)pin(i);else choose(i)});
g.addEventListener('keydown',k=>{if(k.key==='Enter'||k.key===' '){k.preventDefault();choose(i)}});return g});
function rename(){data.nodes.forEach((n,i)=>{const g=marks[i];g.setAttribute('aria-label',plainText(whole(n)+placed(n)));
g.querySelector('title').textContent=plainText(whole(n)+placed(n));const t=g.querySelector('.tag');if(t)t.textContent=plainText(short(nameOf(n),34))})}
rename();
const rowLabels=used.map((r,i)=>{const e=el(fixed,'text',{class:'row',x:8,'text-anchor':'start'},short(data.rows[r],28));el(e,'title',{},data.rows[r]);return[e,bottom[i][1]]});
const footer=el(fixed,'rect',{class:'foot',x:-1,width:'101%'});
const tokenLabels=data.tokens.map((t,c)=>{const g=el(fixed,'g',{}),word=el(g,'text',{class:'axis'},short(shown(t),16)),place=el(g,'text',{class:'place','text-anchor':'middle',y:12},c);
return{g,word,place,x:start[c]+width[c]/2,wide:7.3*[...short(shown(t),16)].length+8,room:width[c]}});
const promptTokens=data.tokens.map((t,c)=>{const s=make($('prompt'),'span','',t.replace(/\n/g,'⏎').replace(/\t/g,'⇥')||'∅');s.title=`position ${c}`;
s.onclick=()=>{const w=svg.clientWidth;tx=MARGIN+(w-MARGIN)/2-k*(start[c]+width[c]/2);moved=true;move();light(c)};return s});
function light(c){promptTokens.forEach((s,i)=>s.classList.toggle('on',i===c));column.setAttribute('class',c===null?'column off':'column on');
if(c!==null&&c<columns){column.setAttribute('x',start[c]);column.setAttribute('width',width[c])}}

// Pan and zoom: the graph moves; row names keep to the left edge and tokens to the bottom, slanted where they are too long.
let k=1,tx=0,ty=0,moved=false,foot=46;
function move(){world.setAttribute('transform',`translate(${tx} ${ty}) scale(${k})`);const h=svg.clientHeight,sub=$('only').checked;
const slanted=tokenLabels.some(t=>t.wide>k*t.room);foot=data.tokens.length&&!sub?(slanted?104:40):0;
footer.setAttribute('y',h-foot);footer.setAttribute('height',foot+1);footer.setAttribute('visibility',foot?'visible':'hidden');
rowLabels.forEach(([e,y])=>{const v=ty+k*y;e.setAttribute('y',v+4);e.setAttribute('visibility',!sub&&v<h-foot-6&&v>6?'visible':'hidden')});
let free=0;tokenLabels.forEach(t=>{const v=tx+k*t.x,half=slanted?6.5:t.wide/2,fits=!sub&&v-half>=free&&v-half>0&&v+half<svg.clientWidth;if(fits)free=v+half;
t.g.setAttribute('transform',`translate(${v} ${h-foot})`);t.g.setAttribute('visibility',fits?'visible':'hidden');
t.word.setAttribute('text-anchor',slanted?'end':'middle');t.word.setAttribute('transform',slanted?'translate(4 22) rotate(-40)':'translate(0 29)')});
// Far out, marks keep a size that can be clicked.
const size=Math.max(1,Math.min(2,.62/k)),words=Math.max(1,Math.min(1.85,.85/k));
marks.forEach((g,i)=>g.setAttribute('transform',`translate(${at[i]}) scale(${data.nodes[i].kind==='readout'?words:size})`))}
function fit(){const sub=$('only').checked,left=sub?20:MARGIN,[wide_,tall_]=sub?subSize():[total,tall],w=svg.clientWidth-left-20;
for(let n=0;n<2;n++){const h=svg.clientHeight-foot-20;k=Math.max(.15,Math.min(1.6,w/(wide_+12),h/tall_));tx=left+Math.max(0,(w-k*wide_)/2);ty=10+Math.max(0,(h-k*tall_)/2);move()}moved=false}
function zoom(f,x,y){const n=Math.min(8,Math.max(.05,k*f));tx=x-(x-tx)*n/k;ty=y-(y-ty)*n/k;k=n;moved=true;move()}
svg.addEventListener('wheel',e=>{e.preventDefault();const r=svg.getBoundingClientRect();zoom(Math.exp(-e.deltaY/500),e.clientX-r.left,e.clientY-r.top)},{passive:false});
let drag=null;
svg.addEventListener('pointerdown',e=>{if(!e.target.closest('.node,.box'))drag=[e.clientX-tx,e.clientY-ty]});
addEventListener('pointermove',e=>{if(drag){tx=e.clientX-drag[0];ty=e.clientY-drag[1];moved=true;move()}});
addEventListener('pointerup',()=>{drag=null});
$('in').onclick=()=>zoom(1.3,svg.clientWidth/2,svg.clientHeight/2);$('out').onclick=()=>zoom(1/1.3,svg.clientWidth/2,svg.clientHeight/2);
$('fit').onclick=fit;addEventListener('resize',()=>{moved?move():fit()});

// Which edges are shown: as many of the strongest as the slider says (its scale is logarithmic), and those of the chosen node.
function measure(){strength=measures[$('measure').value]||shares;order=data.edges.map((e,i)=>i).sort((a,b)=>strength[b]-strength[a]||a-b);strongest=strength[order[0]]||1}
const many=v=>Math.round(Math.expm1(v/1000*Math.log1p(data.edges.length)));
const place=n=>Math.ceil(1000*Math.log1p(n)/Math.log1p(Math.max(1,data.edges.length)));
function paint(){const visible=new Set([...order.slice(0,limit),...always]),n=visible.size;
const mine=chosen===null?[]:[...incoming[chosen],...outgoing[chosen]];mine.forEach(i=>visible.add(i));
paths.forEach((p,i)=>{if(!visible.has(i))p.style.display='none'});const live=new Set(),own=new Set(mine);
visible.forEach(i=>{const e=data.edges[i],p=path(i);live.add(e[0]).add(e[1]);p.style.display='';const gone=removed.has(e[0]);
p.setAttribute('stroke-opacity',gone&&!own.has(i)?.04:chosen===null?.5:own.has(i)?.9:.06);p.setAttribute('stroke-width',(.6+4*Math.sqrt(Math.min(1,strength[i]/strongest))).toFixed(2))});
const near=new Set(mine.flatMap(i=>[data.edges[i][0],data.edges[i][1]]));if(chosen!==null)near.add(chosen);const pins=new Set([...pinned,...groups.flatMap(g=>g.members)]);
marks.forEach((g,i)=>{const keep_=live.has(i)||data.nodes[i].kind==='readout'||i===chosen||pins.has(i)||$('lonely').checked;
g.style.display=keep_?'':'none';g.style.opacity=chosen===null||near.has(i)?1:.3;g.classList.toggle('on',i===chosen);g.classList.toggle('pin',pins.has(i));g.classList.toggle('off',removed.has(i))});
const known=strength.reduce((a,b)=>a+b,0),sum=[...order.slice(0,limit),...[...always]].filter((e,j,all)=>all.indexOf(e)===j).reduce((a,i)=>a+strength[i],0);
$('count').textContent=`${n.toLocaleString('en')} of ${data.allEdges.toLocaleString('en')}`+($('measure').value==='influence'&&known?`, with ${number(+(100*sum/known).toPrecision(2))} % of their influence`:'');
for(const g of [bands,edgeLayer,nodeLayer])g.style.display=$('only').checked?'none':'';subLayer.style.display=$('only').checked?'':'none';if($('only').checked)drawPinned()}
function setLimit(){limit=many(+slider.value);paint()}
slider.addEventListener('input',setLimit);$('lonely').addEventListener('change',paint);$('measure').addEventListener('change',begin);
$('only').addEventListener('change',()=>{paint();fit();remember()});
function choose(i){chosen=chosen===i?null:i;light(chosen===null?null:data.nodes[chosen].pos);paint();details();remember()}
svg.addEventListener('dblclick',()=>{if(chosen!==null)choose(chosen)});
// At first the 150 strongest edges.
function begin(){measure();slider.value=data.edges.length>150?place(150):1000;setLimit()}
